// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Loads a kernel that starts when the one that runs has crashed. The tools of distributions do that with more than a guest
//! of the tests has.

use anyhow::{Context, Result};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

/// `KEXEC_FILE_ON_CRASH` of `linux/kexec.h`.
const ON_CRASH: libc::c_ulong = 2;

/// What to load.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The kernel.
    kernel: PathBuf,
    /// Its initramfs.
    initramfs: PathBuf,
    /// The words of its command line.
    #[arg(trailing_var_arg = true)]
    words: Vec<String>,
}

/// Loads it.
pub(crate) fn load(args: &Args) -> Result<()> {
    let open = |path: &PathBuf| {
        File::open(path).with_context(|| format!("cannot open {}", path.display()))
    };
    let (kernel, initramfs) = (open(&args.kernel)?, open(&args.initramfs)?);
    let words = CString::new(args.words.join(" "))?;
    let len = words.as_bytes_with_nul().len();
    // SAFETY: both files are open, and the words and their end are as many bytes as is said, across the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            len,
            words.as_ptr(),
            ON_CRASH,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).context(
            "cannot load the kernel for a crash: has this one crashkernel= on its command line?",
        );
    }
    Ok(())
}
