// SPDX-License-Identifier: MIT OR Apache-2.0
//! VHDX: what others wrote is read, whatever its log says, and nothing that is wrong does harm.

mod build;
mod hostile;
mod log;
mod oracle;
mod parents;
