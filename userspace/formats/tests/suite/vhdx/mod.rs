// SPDX-License-Identifier: MIT OR Apache-2.0
//! VHDX: the driver reads the images of other programs, with any log, and damaged ones do no harm.

mod build;
mod hostile;
mod log;
mod oracle;
mod parents;
