// SPDX-License-Identifier: MIT OR Apache-2.0
//! tap-ctl: the command line of tap disks.
#![forbid(unsafe_code)]

mod backup;
mod cli;
mod completion;
mod config_step;
mod dirty;
mod disks;
mod doctor;
mod events;
mod format;
mod group;
mod handoff;
mod help;
mod host;
mod jobs;
mod lease;
mod list;
mod metrics;
mod migrate_out;
mod program;
mod report;
mod resize;
mod sample;
mod sample_delta;
mod status;
mod time;
mod top;
mod trace;

use cli::{Cli, Image, Verb};
use control::supervisor::{self, Allocate, Create, Mode, Reply, Request, Which};
use control::tapdisk::Open;
use control::{json_line, shown, shown_lines, Channel, Code, ExitStatus, Failure, Limits, Target};
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Other manual pages.
const SEE_ALSO: &str = "blktapctrl(8), tapdisk(8), tapimg(8), block-tap-rs(8)";

fn main() -> ExitCode {
    let mut cli = help::parse();
    if let Err(error) = disks::resolve(&mut cli).and_then(|()| count(&mut cli)) {
        return end(&cli, Err(error));
    }
    let result = match &cli.verb {
        Verb::Status(asked) => return end(&cli, status::run(&cli, asked)),
        Verb::Doctor => return end(&cli, doctor::run(&cli)),
        Verb::Backup(asked) => return end(&cli, backup::run(&cli, asked)),
        Verb::FreezeGuard { means, seconds } => return backup::freeze_guard(means, *seconds),
        Verb::Restore(asked) => backup::restore(&cli, asked),
        Verb::MigrateOut(asked) => migrate_out::run(&cli, asked),
        Verb::Generate { what } => completion::script(*what, SEE_ALSO)
            .and_then(|text| io::stdout().write_all(text.as_bytes()))
            .map_err(Error::Output),
        Verb::Complete { words } => completion::complete(&cli, words).map_err(Error::Output),
        Verb::List(asked) => list::run(&cli, asked),
        Verb::Metrics(asked) => metrics::run(&cli, asked),
        Verb::Top(asked) => top::run(&cli, asked),
        Verb::Events(asked) => events::follow(&cli, asked),
        Verb::Lease { verb } => about_lease(&cli, verb),
        Verb::Handoff(all) if all.all.is_some() => handoff::all(&cli, all),
        Verb::Stream(asked) => jobs::stream(&cli, asked),
        Verb::Mirror(asked) => jobs::mirror(&cli, asked, false),
        Verb::Commit(asked) => jobs::mirror(&cli, asked, true),
        Verb::Dirty(asked) => dirty::run(&cli, asked),
        Verb::Report(asked) => report::run(&cli, asked),
        verb => once(&cli, verb),
    };
    end(&cli, result.map(|()| ExitCode::SUCCESS))
}

/// Replaces what the command line counts from the present state of a disk.
fn count(cli: &mut Cli) -> Result<(), Error> {
    let Verb::Resize(asked) = &cli.verb else {
        return Ok(());
    };
    let size = resize::settle(cli, asked)?;
    if let (Verb::Resize(asked), Some(size)) = (&mut cli.verb, size) {
        asked.size = Some(control::NewSize::Bytes(size));
    }
    Ok(())
}

/// The exit code, and why it is that one.
fn end(cli: &Cli, result: Result<ExitCode, Error>) -> ExitCode {
    match result {
        Ok(code) => code,
        // Such as `tap-ctl events | head`.
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(Error::Output(error)) => {
            complain(&format!("cannot write: {error}"));
            ExitStatus::Failed.into()
        }
        Err(Error::Failed(failure)) => {
            tell_programs(cli, &failure);
            complain(&failure.to_string());
            ExitStatus::from(failure.code).into()
        }
        // The failure of each disk was printed on its own.
        Err(Error::Some) => ExitStatus::Found.into(),
        Err(Error::Silent(failure)) => {
            // The reason does not matter here: `not-found` would mean a disk.
            tell_programs(cli, &Failure::new(Code::Gone, failure.message.clone()));
            complain(&format!(
                "{failure}: is blktapctrl running? `systemctl start blktapctrl`"
            ));
            ExitStatus::NoSupervisor.into()
        }
    }
}

fn tell_programs(cli: &Cli, failure: &Failure) {
    if cli.json {
        // The message on the standard error says it as well.
        if let Ok(error) = json_line(&serde_json::json!({ "error": failure })) {
            let _ = writeln!(io::stdout(), "{error}");
        }
    }
}

/// Why it was not done.
enum Error {
    /// The answer cannot be printed.
    Output(io::Error),
    /// The supervisor says no.
    Failed(Failure),
    /// The supervisor says nothing.
    Silent(Failure),
    /// The command was executed for some disks and not for others.
    Some,
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Error {
        Error::Output(error)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        match failure.code {
            Code::Gone => Error::Silent(failure),
            _ => Error::Failed(failure),
        }
    }
}

/// How often a supervisor that is not there is looked for.
const AGAIN: Duration = Duration::from_millis(100);

/// Connects; a supervisor that is being started anew is waited for until `limit`.
fn connect(cli: &Cli, limit: Instant) -> Result<Channel, Error> {
    let mut told = false;
    loop {
        let failure = match Channel::connect(&cli.socket) {
            Ok(channel) => return Ok(channel),
            Err(failure) if failure.code == Code::Denied => return Err(Error::Failed(failure)),
            Err(failure) => failure,
        };
        if Instant::now() >= limit {
            return Err(Error::Silent(failure));
        }
        if !std::mem::replace(&mut told, true) {
            let seconds = cli.patience;
            complain(&format!(
                "{failure}: waiting up to {seconds} s for blktapctrl (--patience)"
            ));
        }
        std::thread::sleep(AGAIN);
    }
}

fn patience(cli: &Cli) -> Instant {
    Instant::now() + Duration::from_secs(cli.patience.into())
}

/// Sends a request; repeats it, if that does no harm, to a supervisor that ends before it answers.
fn ask(cli: &Cli, request: &Request) -> Result<Reply, Error> {
    let limit = patience(cli);
    loop {
        match connect(cli, limit)?.ask(request, &[]) {
            Err(failure)
                if failure.code == Code::Gone
                    && may_be_repeated(request)
                    && Instant::now() < limit =>
            {
                complain(&format!("{failure}: asking again"));
                std::thread::sleep(AGAIN);
            }
            result => return Ok(result?),
        }
    }
}

/// Whether a request may be repeated although the supervisor may have carried it out.
fn may_be_repeated(request: &Request) -> bool {
    match request {
        Request::Create(create) => create.vbd.is_some(),
        Request::Ping
        | Request::List(_)
        | Request::Stats(_)
        | Request::Top
        | Request::Check(_)
        | Request::Resize(_)
        | Request::Set { .. }
        | Request::SetGroup { .. }
        | Request::Groups { .. }
        | Request::Grow { .. }
        | Request::Scrub { .. }
        | Request::Stream { .. }
        | Request::Mirror { .. }
        | Request::Commit { .. }
        | Request::EndMirror(_)
        | Request::Marks(_)
        | Request::Changed { .. }
        | Request::Trace { to: None, .. }
        | Request::Handoff { .. }
        | Request::Snapshot { .. }
        | Request::Snapshots { .. }
        | Request::Pause { .. }
        | Request::Park { .. }
        | Request::Unpark
        | Request::Close { .. }
        | Request::Destroy { .. } => true,
        _ => false,
    }
}

/// The failure for an answer that does not belong to its request.
fn something_else(reply: &Reply) -> Failure {
    let what = format!("an answer to something else: {reply:?}");
    Failure::new(Code::Other, what)
}

fn print(json: &impl serde::Serialize) -> Result<(), Error> {
    let text = json_line(json).map_err(io::Error::other)?;
    Ok(writeln!(io::stdout(), "{text}")?)
}

/// Prints a text for a person. Names in it, such as one in the header of an image, may be anything: none acts on the
/// terminal.
fn say(text: &str) -> io::Result<()> {
    io::stdout().write_all(shown_lines(text).as_bytes())
}

/// Says what is wrong. A reader that has gone, as in `tap-ctl report 2>&1 | head`, is no reason to end.
fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "tap-ctl: {}", shown(text));
}

/// Without the supervisor.
fn about_lease(cli: &Cli, verb: &cli::LeaseVerb) -> Result<(), Error> {
    let (text, json) = lease::run(verb).map_err(Error::Failed)?;
    match cli.json {
        true => print(&json),
        false => Ok(say(&text)?),
    }
}

fn once(cli: &Cli, verb: &Verb) -> Result<(), Error> {
    let request = request(verb)?;
    let reply = ask(cli, &request)?;
    if cli.json {
        return print(&reply);
    }
    let text = match (verb, &reply) {
        (Verb::Create(create), Reply::Created { minor, .. }) if create.minor_only => {
            format!("{minor}\n")
        }
        (Verb::Group { verb }, Reply::Groups { groups }) => {
            group::show(groups, matches!(verb, group::GroupVerb::Show { .. }))
        }
        (_, reply) => format::reply(reply),
    };
    Ok(say(&config_step::filled_in(cli, text))?)
}

fn request(verb: &Verb) -> Result<Request, Failure> {
    Ok(match verb {
        Verb::Allocate(node) => Request::Allocate(allocate(node)),
        Verb::Free { minor } => Request::Free { minor: *minor },
        Verb::Spawn => Request::Spawn,
        Verb::Attach(both) => Request::Attach(Which {
            minor: Some(both.minor),
            pid: Some(both.pid),
            vbd: None,
        }),
        Verb::Detach(which) => Request::Detach(named(which)),
        Verb::Open(open) => Request::Open {
            which: named(&open.which),
            open: image(&open.image, open.image.target.parse()?),
            mode: mode(&open.image),
            files: open.image.files.clone(),
        },
        Verb::Close(close) => Request::Close {
            which: named(&close.which),
            force: close.force,
            timeout_s: close.timeout,
        },
        Verb::Pause(pause) => Request::Pause {
            which: named(&pause.which),
            timeout_s: pause.timeout,
        },
        Verb::Unpause(unpause) => Request::Unpause {
            which: named(&unpause.which),
            target: unpause.target.clone(),
            may_shrink: unpause.shrink,
            files: unpause.files.clone(),
        },
        Verb::Handoff(handoff) => Request::Handoff {
            which: named(&handoff.which),
            program: handoff.to.clone(),
            timeout_s: handoff.timeout,
        },
        Verb::Snapshot(snapshot) => self::snapshot(snapshot)?,
        Verb::Resize(resize) => match resize.size.and_then(|size| size.of(0)) {
            Some(size) => Request::Grow {
                which: named(&resize.which),
                size,
            },
            None => Request::Resize(named(&resize.which)),
        },
        Verb::Set(set) => Request::Set {
            which: named(&set.which),
            changes: changes(&set.what),
        },
        Verb::Group { verb } => group::request(verb),
        Verb::Scrub(scrub) => Request::Scrub {
            which: named(&scrub.which),
            rate: u64::from(scrub.rate) << 20,
        },
        Verb::Stream(asked) => jobs::stream_request(asked),
        Verb::Mirror(asked) => jobs::mirror_request(asked, false),
        Verb::Commit(asked) => jobs::mirror_request(asked, true),
        Verb::Dirty(asked) => dirty::request(asked),
        Verb::Trace(asked) => trace::request(asked)?,
        Verb::Stats(which) => Request::Stats(named(which)),
        Verb::Create(create) => Request::Create(Box::new(self::create(create)?)),
        Verb::Destroy(end) => destroy(end),
        Verb::Probe(probe) => Request::Check(supervisor::Check {
            target: target(&probe.target, probe.vbd.as_deref())?,
            mode: probe.mode,
            vbd: probe.vbd.clone(),
        }),
        Verb::Park { timeout } => Request::Park {
            timeout_s: *timeout,
        },
        Verb::Unpark => Request::Unpark,
        Verb::Adopt { minor } => Request::Adopt { minor: *minor },
        Verb::Forget { minor } => Request::Forget { minor: *minor },
        Verb::Status(_)
        | Verb::Doctor
        | Verb::List(_)
        | Verb::Report(_)
        | Verb::Metrics(_)
        | Verb::Top(_)
        | Verb::Events(_)
        | Verb::Lease { .. }
        | Verb::Backup(_)
        | Verb::Restore(_)
        | Verb::MigrateOut(_)
        | Verb::FreezeGuard { .. }
        | Verb::Complete { .. }
        | Verb::Generate { .. } => Request::Top,
    })
}

/// One disk, or several at one instant.
fn snapshot(asked: &cli::Snapshot) -> Result<Request, Failure> {
    let each = asked.disks.iter();
    let disks = each.map(|(which, image)| Ok((named(which), new_image(image, asked.format)?)));
    let mut disks = disks.collect::<Result<Vec<_>, Failure>>()?;
    Ok(match disks.pop() {
        Some((which, target)) if disks.is_empty() => Request::Snapshot { which, target },
        last => {
            disks.extend(last);
            Request::Snapshots { disks }
        }
    })
}

/// Returns the request to destroy a disk. A directory of xenstore alone names the disk, as a toolstack does that knows
/// whether a guest uses it. Beside a number, the directory is the one for which the number was found.
fn destroy(end: &cli::Destroy) -> Request {
    let mut which = named(&end.which);
    let is_found = which.minor.is_some() || which.pid.is_some();
    let of = is_found.then(|| which.vbd.take()).flatten();
    Request::Destroy {
        which,
        timeout_s: end.timeout,
        of,
    }
}

fn new_image(image: &std::path::Path, format: cli::OverlayFormat) -> Result<Target, Failure> {
    let path = std::path::absolute(image)
        .map_err(|error| Failure::system("cannot find the new image's folder", &error))?;
    let path = path.to_str().ok_or_else(|| {
        let path = path.display();
        Failure::invalid(format!("the name {path} is not UTF-8: choose another one"))
    })?;
    format!("{format}:{path}").parse()
}

fn named(which: &cli::Which) -> Which {
    Which {
        minor: which.minor,
        pid: which.pid,
        vbd: which.vbd.clone(),
    }
}

fn mode(image: &Image) -> Mode {
    let usual = if image.readonly {
        Mode::Read
    } else {
        Mode::Write
    };
    image.mode.unwrap_or(usual)
}

fn image(image: &Image, target: Target) -> Open {
    Open {
        engine: image.engine.into(),
        discard: !image.no_discard,
        parents: image.parent_kind,
        ..Open::new(target)
    }
}

fn allocate(node: &cli::Allocate) -> Allocate {
    Allocate {
        minor: node.minor,
        // At most 64 MiB, as the command line is checked.
        arena_kib: node.arena << 10,
        policy: supervisor::Policy {
            fail_after_s: node.policy.fail_after,
            max_deaths: node.policy.max_deaths,
            hung_after_s: node.policy.hung_after,
            hung: node.policy.on_hung(),
            on_no_space: node.policy.on_no_space.into(),
            on_error: node.policy.on_error.into(),
            limits: Limits {
                bytes: node.policy.bps,
                requests: node.policy.iops,
                burst_s: node.policy.burst,
            },
            group: node.policy.group.clone(),
        },
    }
}

fn changes(said: &cli::Changed) -> supervisor::Changes {
    supervisor::Changes {
        hung_after_s: said.hung_after,
        hung: said.hung.map(Into::into),
        on_no_space: said.on_no_space.map(Into::into),
        on_error: said.on_error.map(Into::into),
        bytes: said.bps,
        requests: said.iops,
        burst_s: said.burst,
        group: said.group.clone(),
    }
}

/// A toolstack may have taken the driver's name away; a person says it.
fn target(text: &str, vbd: Option<&str>) -> Result<Target, Failure> {
    match vbd {
        Some(_) => Target::from_params(text),
        None => text.parse(),
    }
}

fn create(create: &cli::Create) -> Result<Create, Failure> {
    let target = target(&create.image.target, create.vbd.as_deref())?;
    let node = allocate(&create.node);
    Ok(Create {
        open: image(&create.image, target),
        mode: mode(&create.image),
        minor: node.minor,
        policy: node.policy,
        arena_kib: node.arena_kib,
        vbd: create.vbd.clone(),
        nbd: create.nbd,
        no_wait: create.no_wait,
        files: create.image.files.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::{request, Cli};
    use clap::{CommandFactory, Parser};
    use control::supervisor::{HungAction, Mode, Request};
    use control::Code;

    fn parse(line: &str) -> Result<Request, Code> {
        let mut cli = Cli::try_parse_from(line.split(' ')).map_err(|_| Code::Other)?;
        let settled = cli.verb.settle();
        settled.map_err(|failure| failure.code)?;
        request(&cli.verb).map_err(|failure| failure.code)
    }

    #[test]
    fn description_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn commands_that_are_recommended_can_be_typed() {
        let verbs = recommended::verbs(&Cli::command());
        recommended::check("tap-ctl", &verbs, |words| {
            recommended::parse::<Cli>(words)?;
            match Cli::try_parse_from(words) {
                Ok(mut cli) => cli.verb.settle().map_err(|why| why.to_string()),
                // A question for help.
                Err(_) => Ok(()),
            }
        });
    }

    #[test]
    fn verbs_of_blktap2_mean_what_they_meant() {
        for line in [
            "tap-ctl list -p 3 -m 4 -t aio -f /srv/a.img",
            "tap-ctl allocate",
            "tap-ctl free -m 3",
            "tap-ctl spawn",
            "tap-ctl attach -p 3 -m 4",
            "tap-ctl detach -p 3 -m 4",
            "tap-ctl open -p 3 -m 4 -a aio:/srv/a.img -R",
            "tap-ctl close -p 3 -m 4 -f -t 5",
            "tap-ctl pause -p 3 -m 4 -t 5",
            "tap-ctl unpause -p 3 -m 4 -a aio:/srv/a.img",
            "tap-ctl stats -p 3 -m 4",
            "tap-ctl create -a aio:/srv/a.img -R",
            "tap-ctl destroy -p 3 -m 4",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
        for line in [
            "tap-ctl attach -p 3",
            "tap-ctl stats",
            "tap-ctl create",
            "tap-ctl create -a aio:/a -R --mode w",
            "tap-ctl create -a aio:/a --arena 65",
        ] {
            assert_eq!(parse(line), Err(Code::Other), "{line}");
        }
        assert_eq!(parse("tap-ctl create -a vdi:/a"), Err(Code::Invalid));
    }

    #[test]
    fn a_new_image_has_a_format_and_an_absolute_path() {
        let target = |line| match parse(line) {
            Ok(Request::Snapshot { which, target }) => (which.minor, target.to_string()),
            other => panic!("{line}: {other:?}"),
        };
        let one = target("tap-ctl snapshot 3 /srv/b.qcow2");
        assert_eq!(one, (Some(3), "qcow2:/srv/b.qcow2".into()));
        let other = target("tap-ctl snapshot 3 --format vhd b:c.vhd");
        assert!(other.1.starts_with("vhd:/") && other.1.ends_with("/b:c.vhd"));
        let Ok(Request::Snapshots { disks }) =
            parse("tap-ctl snapshot 3 /a 1 /b --format vhd 2 /c")
        else {
            panic!("not together");
        };
        let disks: Vec<String> = disks
            .iter()
            .map(|(which, target)| format!("{:?} {target}", which.minor))
            .collect();
        assert_eq!(
            disks,
            ["Some(3) vhd:/a", "Some(1) vhd:/b", "Some(2) vhd:/c"]
        );
        for wrong in ["tap-ctl snapshot 3 /a 1", "tap-ctl snapshot 3 /a /b 1"] {
            assert_eq!(parse(wrong), Err(Code::Invalid));
        }
        let wrong = "tap-ctl snapshot 3 --format aio /srv/b";
        assert_eq!(parse(wrong), Err(Code::Other));
    }

    #[test]
    fn what_the_script_asks_for() {
        let line = "tap-ctl create --vbd backend/vbd/3/51712 --mode w! --minor-only -a /srv/a.img";
        let Ok(Request::Create(create)) = parse(line) else {
            panic!("{line}");
        };
        assert_eq!(create.open.target.to_string(), "aio:/srv/a.img");
        assert_eq!(create.mode, Mode::WriteShared);
        assert_eq!(create.vbd.as_deref(), Some("backend/vbd/3/51712"));
        let line = "tap-ctl create --no-wait --vbd backend/vbd/3/51712 -a ram:1M";
        assert!(matches!(parse(line), Ok(Request::Create(create)) if create.no_wait));
        let line = "tap-ctl probe --vbd backend/vbd/3/51712 --mode r -a /srv/a.img";
        assert!(matches!(parse(line), Ok(Request::Check(check)) if check.mode == Mode::Read));
        let line = "tap-ctl create --files /srv/base.img --files /srv/parts -a aio:/srv/a.img";
        let named = ["/srv/base.img", "/srv/parts"].map(std::path::PathBuf::from);
        assert!(matches!(parse(line), Ok(Request::Create(create)) if create.files == named));
        let line = "tap-ctl create -a qcow:/srv/a.qcow --parent-kind raw";
        let parents = Some(control::Driver::Aio);
        assert!(
            matches!(parse(line), Ok(Request::Create(create)) if create.open.parents == parents)
        );
        let line = "tap-ctl unpause -m 3 --files /srv/base.img";
        assert!(matches!(parse(line), Ok(Request::Unpause { files, .. }) if files == named[..1]));
        // By hand a driver is named.
        assert_eq!(parse("tap-ctl create -a /srv/a.img"), Err(Code::Invalid));
    }

    /// Scripts have the words of earlier versions.
    #[test]
    fn older_words_mean_the_same_and_are_hidden() {
        for (old, new) in [
            ("check -a aio:/srv/a.img", "probe -a aio:/srv/a.img"),
            (
                "create -a qcow:/a --parents raw",
                "create -a qcow:/a --parent-kind raw",
            ),
            (
                "trace web xvda --to /dev/shm/web",
                "trace web xvda -o /dev/shm/web",
            ),
        ] {
            let [old, new] = [old, new].map(|line| parse(&format!("tap-ctl {line}")));
            assert!(new.is_ok() && old == new, "{old:?} {new:?}");
        }
        for verb in ["status", "report", "metrics"] {
            for option in ["hung", "hung-after"] {
                let line = format!("tap-ctl {verb} --{option} 7");
                assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
            }
        }
        let mut command = Cli::command();
        command.build();
        for (verb, option) in [
            ("status", "--hung "),
            ("create", "--parents"),
            ("trace", "--to "),
        ] {
            let verb = command.find_subcommand_mut(verb).expect("a verb");
            let text = verb.render_long_help().to_string();
            assert!(!text.contains(option), "{text}");
        }
        assert!(!command.render_help().to_string().contains("  check"));
    }

    #[test]
    fn only_what_does_no_harm_is_asked_twice() {
        let again = |line: &str| super::may_be_repeated(&parse(line).expect("a question"));
        for line in [
            "tap-ctl list",
            "tap-ctl pause -m 3",
            "tap-ctl destroy -m 3",
            "tap-ctl create --vbd backend/vbd/3/51712 -a ram:1M",
        ] {
            assert!(again(line), "{line}");
        }
        for line in [
            "tap-ctl create -a ram:1M",
            "tap-ctl allocate",
            "tap-ctl spawn",
            "tap-ctl unpause -m 3",
            "tap-ctl free -m 3",
        ] {
            assert!(!again(line), "{line}");
        }
    }

    #[test]
    fn policy_is_passed_on() {
        let line = "tap-ctl create -a ram:1M --arena 8 --fail-after 7 --hung kill --hung-after 9 --max-deaths 5";
        let Ok(Request::Create(create)) = parse(line) else {
            panic!("{line}");
        };
        assert_eq!(create.arena_kib, 8192);
        assert_eq!(create.policy.fail_after_s, 7);
        assert_eq!(create.policy.hung_after_s, 9);
        assert_eq!(create.policy.hung, HungAction::Kill);
        assert_eq!(create.policy.max_deaths, 5);
    }

    #[test]
    fn action_on_a_hung_process_has_one_name_and_an_older_one() {
        for (said, action) in [
            ("", HungAction::Report),
            (" --hung report", HungAction::Report),
            (" --hung kill", HungAction::Kill),
            (" --kill-hung", HungAction::Kill),
        ] {
            let line = format!("tap-ctl create -a ram:1M{said}");
            let made = parse(&line);
            assert!(
                matches!(&made, Ok(Request::Create(create)) if create.policy.hung == action),
                "{line}: {made:?}"
            );
        }
        // The older name would contradict it.
        assert!(parse("tap-ctl create -a ram:1M --kill-hung --hung report").is_err());
        let mut create = Cli::command();
        let help = create
            .find_subcommand_mut("create")
            .expect("a verb")
            .render_long_help();
        let help = help.to_string();
        assert!(
            help.contains("--hung <WHAT>") && !help.contains("--kill-hung"),
            "{help}"
        );
    }

    #[test]
    fn groups_are_made_and_joined() {
        let name = || "all.7".parse::<control::GroupName>().expect("a name");
        let line = "tap-ctl group set all.7 --bytes-per-second 20M --iops 500 --burst 2";
        let Ok(Request::SetGroup { name: its, changes }) = parse(line) else {
            panic!("{line}");
        };
        assert_eq!((its, changes.bytes), (name(), Some(20 << 20)));
        assert_eq!((changes.requests, changes.burst_s), (Some(500), Some(2)));
        let line = "tap-ctl group set all.7 --iops 20k";
        let Ok(Request::SetGroup { changes, .. }) = parse(line) else {
            panic!("{line}");
        };
        assert_eq!(changes.requests, Some(20_000));
        let all = Request::Groups { name: None };
        assert_eq!(parse("tap-ctl group list"), Ok(all));
        let one = Request::Groups { name: Some(name()) };
        assert_eq!(parse("tap-ctl group show all.7"), Ok(one));
        let gone = Request::RemoveGroup { name: name() };
        assert_eq!(parse("tap-ctl group remove all.7"), Ok(gone));
        for (said, group) in [
            ("all.7", control::InGroup::Named(name())),
            ("none", control::InGroup::None),
        ] {
            let line = format!("tap-ctl set -m 3 --group {said}");
            assert!(
                matches!(parse(&line), Ok(Request::Set { changes, .. }) if changes.group == Some(group))
            );
        }
        let line = "tap-ctl create -a ram:1M --group all.7";
        assert!(
            matches!(parse(line), Ok(Request::Create(create)) if create.policy.group == Some(name()))
        );
        for wrong in [
            "tap-ctl group set all.7",
            "tap-ctl group set a/b --bps 1M",
            "tap-ctl group show none",
            "tap-ctl create -a ram:1M --group none",
        ] {
            assert_eq!(parse(wrong), Err(Code::Other), "{wrong}");
        }
    }

    #[test]
    fn help_names_each_exit_code() {
        let text = Cli::command().render_long_help().to_string();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let (_, text) = text.split_once("Exit status").expect("the codes");
        for status in control::ExitStatus::ALL {
            let code = status.number();
            let is_named = [" if", " for"].map(|end| text.contains(&format!(" {code}{end}")));
            assert!(is_named.contains(&true), "{code}: {text}");
        }
    }

    #[test]
    fn help_says_what_a_verb_does_to_a_disk() {
        let mut command = Cli::command();
        for (verb, words) in [
            ("handoff", "the old one continues to serve the disk"),
            (
                "snapshot",
                "THE CONFIGURATION OF THE DISK STILL NAMES THE OLD IMAGE",
            ),
            ("stream", "without internal snapshots"),
            ("commit", "the chain is one image shorter"),
            ("mirror", "the disk stays with the image that it has"),
            ("metrics", "the textfile collector"),
            ("top", "the mean times of the guest's reads"),
        ] {
            let verb = command.find_subcommand_mut(verb).expect("a verb");
            let text = verb.render_long_help().to_string();
            let text: Vec<&str> = text.split_whitespace().collect();
            assert!(text.join(" ").contains(words), "{text:?}");
        }
    }
}
