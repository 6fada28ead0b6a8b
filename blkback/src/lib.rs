//! The pure engine of the vbd driver.
#![no_std]
#![forbid(unsafe_code)]
