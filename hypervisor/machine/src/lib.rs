#![no_std]
#![forbid(unsafe_code)]

pub mod emulate;
#[cfg(any(test, feature = "mock"))]
pub mod mock;
pub mod paging;
