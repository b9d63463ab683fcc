//! Every emulator test, as data.
