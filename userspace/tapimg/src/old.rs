// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs of Xen's tools and of XCP-ng that this one is, too, under their names: it takes their options, and answers
//! as they do.

mod vhd_util;

use crate::open::{Opener, Use};
use clap::Parser;
use control::{Code, Failure};
use diskio::Runtime;
use std::ffi::OsStr;
use std::future::Future;
use std::path::Path;
use std::process::ExitCode;

/// Does what the program of that name does; nothing if it is none of them.
pub(crate) fn by_name(program: &OsStr) -> Option<ExitCode> {
    let name = Path::new(program).file_name()?;
    (name == "vhd-util").then(vhd_util)
}

fn vhd_util() -> ExitCode {
    let cli = vhd_util::Cli::parse();
    match run(|opener| async move { vhd_util::verb(&cli, &opener).await }) {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("vhd-util: {failure}");
            ExitCode::from(number(failure.code))
        }
    }
}

fn run<F: Future<Output = Result<String, Failure>> + 'static>(
    work: impl FnOnce(Opener) -> F,
) -> Result<String, Failure> {
    let runtime = Runtime::new();
    let opener = Opener::start(&runtime, Use::Read, None)?;
    runtime
        .block_on(work(opener))
        .map_err(|error| Failure::system("cannot wait for I/O", &error))?
}

/// Those programs end with the number of an error.
fn number(code: Code) -> u8 {
    let errno = match code {
        Code::NotFound => libc::ENOENT,
        Code::Busy => libc::EBUSY,
        Code::Invalid | Code::Image | Code::Unsupported => libc::EINVAL,
        _ => libc::EIO,
    };
    u8::try_from(errno).unwrap_or(1)
}
