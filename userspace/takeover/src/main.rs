// SPDX-License-Identifier: MIT OR Apache-2.0
//! xen-blkback-takeover: see `--help`.
#![forbid(unsafe_code)]

mod modules;
mod xen_host;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use control::{Code, ExitStatus, Failure};
use manual::Generated;
use std::io;
use std::process::ExitCode;
use std::time::Duration;
use takeover::{
    exchange, retire, take_over, BackendDriver, Exchange, RetiredDriver, SwapOutcome, SwapPlan,
};
use xen_host::XenHost;

/// Have the other driver serve the disks of guests that run.
///
/// This pauses one guest after the other, waits until its requests are answered, gives its disks to the other driver,
/// and unpauses it. The guest sees a pause, and its disks as they were. A disk for which that would not be safe stays
/// with the driver that it has, and the output shows the reason. When the other driver serves all, the first one is
/// unloaded.
///
/// This changes who serves now. The driver after the next boot is the choice of xen-blkback-rs enable | disable.
///
/// The commands to type are xen-blkback-rs takeover and xen-blkback-rs exchange, which run this program with their
/// options.
#[derive(Debug, Parser)]
#[command(
    name = "xen-blkback-takeover",
    bin_name = "xen-blkback-rs takeover",
    version,
    after_long_help = HELP
)]
struct TakeoverCli {
    /// The driver that shall serve
    #[arg(long, value_enum, default_value = "xen-blkback-rs")]
    to: To,
    /// Only the disks of this guest, by its number; may be given several times
    #[arg(long, value_name = "DOMID")]
    domain: Vec<u16>,
    /// Seconds to wait until all that a guest has asked for is answered; it is paused meanwhile
    #[arg(long, value_name = "SECONDS", default_value = "5", global = true)]
    patience: f64,
    /// Only say what would be done
    #[arg(long, global = true)]
    dry_run: bool,
    /// Print JSON, for programs: a line for each guest
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Option<TakeoverVerb>,
}

#[derive(Debug, Subcommand)]
enum TakeoverVerb {
    /// Exchange the module for the one that is installed, below all disks at once, tap disks too
    ///
    /// This pauses all guests that have disks of xen-blkback-rs, waits until their requests are answered, takes their
    /// disks from the driver, exchanges the module, and unpauses them: a pause of a second or a few. It is all or
    /// nothing. If the installed module cannot be loaded, or does not serve a disk as the one before has, that one
    /// takes its place again, from the copy that an upgrade of the package keeps (/run/xen-blkback-rs/loaded.ko).
    ///
    /// Processes of tap disks are ended in order and started anew; clients of their NBD sockets have to connect again.
    /// blktapctrl has to run.
    #[command(override_usage = "xen-blkback-rs exchange [OPTIONS]")]
    Exchange {
        /// Also if the installed module is the one that is loaded, such as for other parameters (/etc/modprobe.d)
        #[arg(long)]
        again: bool,
        /// Also if no copy of the module that is loaded was kept: then nothing serves if the installed one cannot
        #[arg(long)]
        no_way_back: bool,
    },
    /// Print what is made from this description
    #[command(hide = true)]
    Generate {
        /// Kind of the output
        what: Generated,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum To {
    /// This one
    XenBlkbackRs,
    /// The C driver
    XenBlkback,
}

const HELP: &str = "\
Examples:
  xen-blkback-rs takeover --dry-run            # which disks would change, and which would not
  xen-blkback-rs takeover                      # from the C driver to xen-blkback-rs
  xen-blkback-rs takeover --domain 3           # the disks of one guest
  xen-blkback-rs takeover --to xen-blkback     # back

  xen-blkback-rs exchange                      # a new version of the module, below all disks, tap disks too

If no guest may be paused at the same time as others, a new version also comes by a takeover to xen-blkback, which unloads
the old one, and back: guest after guest, but not below tap disks.

These disks stay with their driver: those of domain 0, which cannot be paused, those that are being detached or whose
storage does not answer, and tap disks, which only xen-blkback-rs can serve.

If this is killed in the middle, a guest may be left paused and a disk without a driver: the next run first puts
that right.

Exit status, with the numbers of tap-ctl(8): 0 if the requested driver serves all disks, 1 if some are
not or the other one stays loaded, 2 for a wrong command line, 6 if nothing could be begun.";

/// Other manual pages.
const SEE_ALSO: &str = "xen-blkback-rs(8), xl(1)";

fn main() -> ExitCode {
    let cli: TakeoverCli = manual::parse();
    if let Some(TakeoverVerb::Generate { what }) = cli.verb {
        return match manual::write(TakeoverCli::command(), what, SEE_ALSO, &mut io::stdout()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error, false),
        };
    }
    let done = match cli.verb {
        Some(TakeoverVerb::Exchange { again, no_way_back }) => {
            run_exchange(&cli, again, no_way_back)
        }
        _ => run(&cli),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitStatus::Found.into(),
        Err(error) => failed(&error, cli.json),
    }
}

fn failed(error: &io::Error, json: bool) -> ExitCode {
    if json {
        // The message on the standard error says it as well.
        let failure = Failure::new(Code::System, error.to_string());
        if let Ok(line) = control::json_line(&serde_json::json!({ "error": failure })) {
            println!("{line}");
        }
    }
    eprintln!("xen-blkback-takeover: {error}");
    ExitStatus::Failed.into()
}

fn patience(cli: &TakeoverCli) -> io::Result<Duration> {
    Duration::try_from_secs_f64(cli.patience)
        .map_err(|error| io::Error::other(format!("--patience: {error}")))
}

/// True if the installed module serves.
fn run_exchange(cli: &TakeoverCli, again: bool, no_way_back: bool) -> io::Result<bool> {
    let plan = Exchange {
        patience: patience(cli)?,
        again,
        no_way_back,
        dry_run: cli.dry_run,
    };
    let outcome = exchange(&XenHost::new()?, plan)?;
    let would = cli.dry_run && outcome.left.is_empty() && outcome.why.is_none();
    if cli.json {
        println!("{}", control::json_line(&outcome)?);
        return Ok(outcome.is_done || would);
    }
    for left in &outcome.left {
        println!("{}: {}", left.disk, left.why);
    }
    let module = BackendDriver::Rs.module();
    let pause = match outcome.paused_ms {
        Some(paused) => format!(" (guests were paused for {paused} ms)"),
        None => String::new(),
    };
    let why = outcome.why.map_or(String::new(), |why| format!(": {why}"));
    let disks = match outcome.disks.len() {
        0 => "no disks".into(),
        _ => outcome.disks.join(", "),
    };
    println!(
        "{}",
        match (outcome.is_done, outcome.is_as_before) {
            (true, _) if outcome.paused_ms.is_none() && !why.is_empty() => format!("{module}{why}"),
            (true, _) => format!("{module} was exchanged below {disks}{pause}"),
            (false, true) => format!("{module} was not exchanged{why}{pause}"),
            (false, false) if would => format!("{module} would be exchanged below {disks}"),
            (false, false) => format!("{module}: not all is well{why}{pause}"),
        }
    );
    Ok(outcome.is_done || would)
}

/// True if no disk was left.
fn run(cli: &TakeoverCli) -> io::Result<bool> {
    let to = match cli.to {
        To::XenBlkbackRs => BackendDriver::Rs,
        To::XenBlkback => BackendDriver::C,
    };
    let patience = patience(cli)?;
    let plan = SwapPlan {
        from: to.other(),
        to,
        patience,
        dry_run: cli.dry_run,
    };
    let host = XenHost::new()?;
    let outcomes = take_over(&host, plan, &cli.domain, |outcome| {
        show(outcome, plan, cli.json);
    })?;
    let all = outcomes.iter().all(|outcome| outcome.left.is_empty());
    if cli.dry_run || !all || !cli.domain.is_empty() {
        return Ok(all);
    }
    let (from, to) = (plan.from.module(), to.module());
    let (is_retired, said) = match retire(&host, plan)? {
        RetiredDriver::Unloaded => (true, format!("{to} serves all disks; {from} is unloaded")),
        RetiredDriver::Serves => (
            false,
            format!("{from} serves a disk that came meanwhile: ask again"),
        ),
        RetiredDriver::Stays(error) => (
            false,
            format!(
                "{to} serves all disks, and {from} is still loaded, so that new ones may get it: {error}; what uses it \
                 may be the supervisor of tap disks: systemctl stop blktapctrl.socket blktapctrl.service, and ask again"
            ),
        ),
    };
    match cli.json {
        false => println!("{said}"),
        true if !is_retired => eprintln!("xen-blkback-takeover: {said}"),
        true => {}
    }
    Ok(is_retired)
}

fn show(outcome: &SwapOutcome, plan: SwapPlan, json: bool) {
    if json {
        match control::json_line(outcome) {
            Ok(line) => println!("{line}"),
            Err(error) => eprintln!("xen-blkback-takeover: {error}"),
        }
        return;
    }
    let domid = outcome.domid;
    if !outcome.moved.is_empty() {
        let (disks, to) = (outcome.moved.join(", "), plan.to.module());
        match outcome.paused_ms {
            Some(paused) => {
                println!("guest {domid}: {disks} served by {to} (paused for {paused} ms)")
            }
            None => println!("guest {domid}: {disks} would be served by {to}"),
        }
    }
    for left in &outcome.left {
        let from = plan.from.module();
        println!(
            "guest {domid}: {} stays with {from}: {}",
            left.disk, left.why
        );
    }
}

#[cfg(test)]
mod tests {
    use super::TakeoverCli;
    use clap::CommandFactory;

    #[test]
    fn description_is_sound() {
        TakeoverCli::command().debug_assert();
    }

    #[test]
    fn help_fits_80_columns_and_the_manual_has_each_verb_and_option() {
        recommended::assert_help_fits(manual::fitted(TakeoverCli::command(), 80), 80);
        let page = manual::page(TakeoverCli::command(), "").expect("a page");
        let page = String::from_utf8(page).expect("text");
        recommended::assert_page_is_complete(TakeoverCli::command(), &page);
    }

    /// `xen-blkback-rs` is a script that has verbs of its own, and runs this program for the others.
    #[test]
    fn commands_that_are_recommended_can_be_typed() {
        let verbs = ["enable", "disable", "status", "takeover", "exchange"].map(String::from);
        recommended::check("xen-blkback-rs", &verbs, |words| {
            let Some((verb, rest)) = words.get(1..).and_then(<[String]>::split_first) else {
                return Err("a verb is missing".into());
            };
            let verb = match (verb.as_str(), rest.is_empty()) {
                ("enable" | "disable" | "status", true) => return Ok(()),
                ("status", false) if rest == ["--json"] => return Ok(()),
                ("takeover", _) => None,
                ("exchange", _) => Some("exchange"),
                _ => return Err(format!("{verb} is no verb, or takes no arguments")),
            };
            let line = ["xen-blkback-takeover"].into_iter().chain(verb);
            let line: Vec<&str> = line.chain(rest.iter().map(String::as_str)).collect();
            recommended::parse::<TakeoverCli>(&line)
        });
    }
}
