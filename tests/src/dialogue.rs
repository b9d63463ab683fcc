//! Plays a case.
