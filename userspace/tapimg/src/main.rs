// SPDX-License-Identifier: MIT OR Apache-2.0
//! tapimg: the images of tap disks.
#![forbid(unsafe_code)]
// These panic if the reader is gone; `diskio::say!` and `writeln!` do not.
#![deny(clippy::print_stderr, clippy::print_stdout)]

mod chain;
mod check;
mod cli;
mod commit;
mod compare;
mod compat;
mod convert;
mod create;
mod dirty_runs;
mod follow;
mod image_spec;
mod info;
mod made;
mod map;
mod open;
mod ova;
mod packed;
mod part;
mod progress;
mod rebase;
mod replay;
mod resize;
mod salvage;
mod sector;
mod serve;
mod signals;
mod snapshot;
mod target;
mod walk;

use clap::CommandFactory;
use cli::{Cli, Verb};
use control::{json_line, shown, shown_lines, ExitStatus, Failure};
use diskio::Runtime;
use image_spec::ImageSpec;
use open::{ImageOpener, Use};
use serde::Serialize;
use signals::Stop;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;

/// Other manual pages.
const SEE_ALSO: &str = "tap-ctl(8), tapdisk(8), qemu-img(1)";

/// Why it was not done.
#[derive(Debug)]
pub(crate) enum Error {
    /// The answer cannot be printed.
    Output(io::Error),
    /// Something else.
    Failed(Failure),
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Result of a verb: exit status 0 or 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum VerbOutcome {
    /// All is as it should be.
    Good,
    /// Images differ, or something is wrong with one.
    Bad,
}

fn main() -> ExitCode {
    if let Some(done) = std::env::args_os()
        .next()
        .and_then(|name| compat::by_name(&name))
    {
        return done;
    }
    let cli: Cli = manual::parse();
    let json = cli.json;
    match run(cli) {
        Ok(VerbOutcome::Good) => ExitCode::SUCCESS,
        Ok(VerbOutcome::Bad) => ExitStatus::Found.into(),
        // Such as `tapimg map ... | head`.
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(Error::Output(error)) => {
            let _ = writeln!(io::stderr(), "tapimg: cannot write: {error}");
            ExitStatus::Failed.into()
        }
        Err(Error::Failed(failure)) => {
            if json {
                // The message on the standard error says it as well.
                if let Ok(error) = json_line(&serde_json::json!({ "error": failure })) {
                    let _ = writeln!(io::stdout(), "{error}");
                }
            }
            let _ = writeln!(io::stderr(), "tapimg: {}", shown(&failure.to_string()));
            ExitStatus::from(failure.code).into()
        }
    }
}

fn run(cli: Cli) -> Result<VerbOutcome, Error> {
    if let Verb::Generate { what } = cli.verb {
        manual::write(Cli::command(), what, SEE_ALSO, &mut io::stdout())?;
        return Ok(VerbOutcome::Good);
    }
    if let Verb::ServeConfined { user } = &cli.verb {
        serve::confined(user.as_deref())?;
        return Ok(VerbOutcome::Good);
    }
    if let Verb::Serve(args) = &cli.verb {
        if cli.follow || !cli.parent_at.is_empty() {
            return Err(Failure::invalid(
                "serve has no --follow and no --parent-at: name files that clients may read with --allow",
            )
            .into());
        }
        return serve::serve(args, cli.parent_kind.map(|kind| kind.0), cli.json);
    }
    if let Some(parent) = cli.die_with {
        part::die_with(parent)?;
    }
    let runtime = Runtime::new();
    // Threads inherit what is blocked of signals, so this comes first.
    let stop = match cli.verb {
        Verb::Convert(_) | Verb::Rebase(_) | Verb::Commit(_) => Stop::listen(&runtime)?,
        _ => Stop::default(),
    };
    let reading = match &cli.verb {
        Verb::Info(info) if info.unlocked => Use::Look,
        _ => Use::Read,
    };
    let parents = cli.parent_kind.map(|kind| kind.0);
    let opener = ImageOpener {
        moved: moved(&cli.parent_at)?,
        follow: cli.follow,
        ..ImageOpener::start(&runtime, reading, parents)?
    };
    let work = async move { verb(&cli, &opener, &stop).await };
    runtime
        .block_on(work)
        .map_err(|error| Failure::system("cannot wait for I/O", &error))?
}

/// The absolute paths of parents, which must be there.
fn moved(paths: &[PathBuf]) -> Result<Rc<[PathBuf]>, Failure> {
    let found = paths.iter().map(|path| {
        let cannot = |error| Failure::system(format!("cannot find {}", path.display()), &error);
        let path = std::path::absolute(path).map_err(cannot)?;
        std::fs::metadata(&path).map_err(cannot).map(|_| path)
    });
    let found: Result<Vec<PathBuf>, Failure> = found.collect();
    found.map(Rc::from)
}

/// The images of a verb that cannot be disks in an OVA.
fn no_ovas(verb: &Verb) -> Vec<&ImageSpec> {
    match verb {
        Verb::Info(args) => vec![&args.image],
        Verb::Create(args) => args.layout.parent.iter().chain([&args.image]).collect(),
        Verb::Convert(args) => args.layout.parent.iter().chain([&args.to]).collect(),
        Verb::Check(args) => vec![&args.image],
        Verb::Resize(args) => vec![&args.image],
        Verb::Rebase(args) => args.parent.iter().chain([&args.image]).collect(),
        Verb::Commit(args) => vec![&args.image],
        Verb::Snapshot(args) => args.overlay.iter().chain([&args.image]).collect(),
        Verb::Replay(args) => args.image.iter().collect(),
        Verb::Compare(_)
        | Verb::Map(_)
        | Verb::Generate { .. }
        | Verb::Serve(_)
        | Verb::ServeConfined { .. } => Vec::new(),
    }
}

async fn verb(cli: &Cli, opener: &ImageOpener, stop: &Stop) -> Result<VerbOutcome, Error> {
    no_ovas(&cli.verb)
        .into_iter()
        .try_for_each(ImageSpec::refuse_ova)?;
    let mut out = BufWriter::new(io::stdout());
    let good = match &cli.verb {
        Verb::Info(args) => {
            let all = info::info(opener, args).await?;
            let text: Vec<String> = all.iter().map(info::Facts::text).collect();
            print(cli, &mut out, &all, &text.concat())?;
            all.iter().all(info::Facts::is_good)
        }
        Verb::Create(args) => {
            let made = create::create(opener, args).await?;
            print(cli, &mut out, &made, "")?;
            true
        }
        Verb::Convert(args) => {
            let done = convert::convert(opener, stop, args).await?;
            print(cli, &mut out, &done, "")?;
            true
        }
        Verb::Check(args) => {
            let findings = check::check(opener, args).await?;
            print(cli, &mut out, &findings, &findings.text())?;
            findings.is_good()
        }
        Verb::Compare(args) => {
            let verdict = compare::compare(opener, args).await?;
            print(cli, &mut out, &verdict, &verdict.text())?;
            verdict.is_good()
        }
        Verb::Map(args) => {
            map::map(opener, args, cli.json, &mut out).await?;
            true
        }
        Verb::Resize(args) => {
            let done = resize::resize(opener, args).await?;
            print(cli, &mut out, &done, &done.text())?;
            true
        }
        Verb::Rebase(args) => {
            let done = rebase::rebase(opener, stop, args).await?;
            print(cli, &mut out, &done, &done.text())?;
            true
        }
        Verb::Commit(args) => {
            let done = commit::commit(opener, stop, args).await?;
            print(cli, &mut out, &done, &done.text())?;
            true
        }
        Verb::Snapshot(args) => {
            let answer = snapshot::snapshot(opener, args).await?;
            print(cli, &mut out, &answer, &answer.text())?;
            true
        }
        Verb::Replay(args) => {
            match &args.image {
                Some(image) => {
                    let done = replay::replay(opener, args, image).await?;
                    print(cli, &mut out, &done, &done.text())?;
                }
                None => replay::list(args, cli.json, &mut out)?,
            }
            true
        }
        // These have no image that this process works on.
        Verb::Generate { .. } | Verb::Serve(_) | Verb::ServeConfined { .. } => true,
    };
    Ok(if good {
        VerbOutcome::Good
    } else {
        VerbOutcome::Bad
    })
}

/// Prints an answer, for a program or a person.
fn print(cli: &Cli, out: &mut impl Write, json: &impl Serialize, text: &str) -> Result<(), Error> {
    match cli.json {
        true => {
            let text = json_line(json).map_err(io::Error::other)?;
            writeln!(out, "{text}")?;
        }
        // Names in an image, such as that of its parent, may be anything: none acts on the terminal.
        false => out.write_all(shown_lines(text).as_bytes())?,
    }
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::Cli;
    use clap::{CommandFactory, Parser};

    #[test]
    fn description_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_fits_80_columns_and_the_manual_has_each_verb_and_option() {
        recommended::assert_help_fits(manual::fitted(Cli::command(), 80), 80);
        let page = manual::page(Cli::command(), "").expect("a page");
        let page = String::from_utf8(page).expect("text");
        recommended::assert_page_is_complete(Cli::command(), &page);
    }

    #[test]
    fn commands_that_are_recommended_can_be_typed() {
        recommended::check_program::<Cli>("tapimg");
    }

    #[test]
    fn lines_that_are_understood() {
        for line in [
            "tapimg info --json --chain qcow2:/a",
            "tapimg --json info -U qcow2:/a",
            "tapimg create qcow2:/a 10G --cluster-size 128K",
            "tapimg create qcow2:/a --parent vhd:/b",
            "tapimg create qcow2:/a 10G --sector-size 4096",
            "tapimg convert vhdx:/a vhd:/b --sector-size 512",
            "tapimg create qcow2:/a +1G --parent vhd:/b",
            "tapimg create vhd:/a 1.5GiB --reserve 10MiB",
            "tapimg convert vhd:/a qcow2:/b --parent aio:/c --progress",
            "tapimg convert vhd:/a qcow2:/b --parent aio:/c --changed /d --rate 20",
            "tapimg compare vhd:/a qcow2:/b --changed /d --rate 1.5G",
            "tapimg check --repair qcow2:/a",
            "tapimg compare --strict aio:/a raw:/b",
            "tapimg map --layer --parent-kind aio qcow:/a",
            "tapimg resize aio:/a 10G --shrink --lose-data",
            "tapimg rebase qcow2:/a --parent vhd:/b --unsafe",
            "tapimg rebase qcow2:/a --no-parent --progress",
            "tapimg rebase vmdk:/a --parent vmdk:/b --moved",
            "tapimg convert vhdx:/a qcow2:/b --parent-at /srv/old --parent-at /srv/c.vhdx",
            "tapimg snapshot qcow2:/a vhd:/b",
            "tapimg commit vhd:/b --progress",
            "tapimg replay /a.trace aio:/b --from 5 --until 2s",
            "tapimg replay /a.trace --list --json",
            // Words of earlier versions.
            "tapimg replay /a.trace aio:/b --to 2s",
            "tapimg map --parents aio qcow:/a",
            "tapimg serve --write --allow /b qcow2:a.qcow2 a.sock",
            "tapimg serve cow:qcow2:/a a.sock --json --export a",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
        for line in [
            "tapimg",
            "tapimg info /a",
            "tapimg info qcow3:/a",
            "tapimg create qcow2:/a 1X",
            "tapimg create qcow2:/a 513",
            "tapimg create qcow2:/a 1G --sector-size 1024",
            "tapimg convert aio:/a",
            "tapimg convert aio:/a aio:/b --rate 0",
            "tapimg map --parent-kind png qcow:/a",
            "tapimg resize aio:/a 10G --lose-data",
            "tapimg rebase qcow2:/a",
            "tapimg replay /a.trace",
            "tapimg serve qcow2:/a",
            "tapimg serve qcow3:/a a.sock",
            "tapimg replay /a.trace aio:/b --list",
            "tapimg replay /a.trace aio:/b --from yesterday",
            "tapimg rebase qcow2:/a --parent aio:/b --no-parent",
            "tapimg rebase qcow2:/a --parent aio:/b --moved --unsafe",
            "tapimg rebase qcow2:/a --no-parent --moved",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
