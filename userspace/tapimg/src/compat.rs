// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs of blktap whose options this program takes under their names, for scripts. XCP-ng's storage manager needs
//! more than they have here.

mod qcow;
mod vhd_util;

use crate::cli;
use crate::image_spec::ImageSpec;
use crate::open::{ImageOpener, Use};
use control::{shown, shown_lines, Code, ExitStatus, Failure};
use diskio::Runtime;
use formats::Below;
use std::ffi::OsStr;
use std::future::Future;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

const MIB: u64 = 1 << 20;

/// Does what the program of that name does; nothing if it is none of them.
pub(crate) fn by_name(program: &OsStr) -> Option<ExitCode> {
    let name = Path::new(program).file_name()?.to_str()?;
    let done = match name {
        "vhd-util" => {
            let cli = manual::parse::<vhd_util::VhdUtilCli>();
            run(
                None,
                |opener| async move { vhd_util::verb(&cli, &opener).await },
            )
        }
        "qcow-create" => {
            let cli = manual::parse::<qcow::Make>();
            run(
                cli.parents(),
                |opener| async move { cli.run(&opener).await },
            )
        }
        "img2qcow" => {
            let cli = manual::parse::<qcow::FromRaw>();
            run(None, |opener| async move { cli.run(&opener).await })
        }
        "qcow2raw" => {
            let cli = manual::parse::<qcow::ToRaw>();
            run(
                cli.parents(),
                |opener| async move { cli.run(&opener).await },
            )
        }
        _ => return None,
    };
    Some(match done {
        Ok(text) => match print(&shown_lines(&text)) {
            // Such as `vhd-util scan ... | head`.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                diskio::say!("{name}: cannot write: {error}");
                ExitStatus::Failed.into()
            }
            _ => ExitCode::SUCCESS,
        },
        Err(failure) => {
            diskio::say!("{name}: {}", shown(&failure.to_string()));
            ExitCode::from(number(failure.code))
        }
    })
}

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn run<F: Future<Output = Result<String, Failure>> + 'static>(
    parents: Option<Below>,
    work: impl FnOnce(ImageOpener) -> F,
) -> Result<String, Failure> {
    let runtime = Runtime::new();
    let opener = ImageOpener::start(&runtime, Use::Read, parents)?;
    runtime
        .block_on(work(opener))
        .map_err(|error| Failure::system("cannot wait for I/O", &error))?
}

/// An image of a kind that its program is for.
fn named(path: &Path, kind: Below) -> Result<ImageSpec, Failure> {
    let path = std::path::absolute(path)
        .map_err(|error| Failure::system(format!("cannot find {}", path.display()), &error))?;
    Ok(ImageSpec::plain(kind, path))
}

/// A size of so many MiB.
fn mib(count: impl Into<u64>) -> Result<cli::Size, Failure> {
    let count = count.into();
    let size = count.checked_mul(MIB).map(cli::Size);
    size.ok_or_else(|| Failure::invalid(format!("{count} MiB are too many")))
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
