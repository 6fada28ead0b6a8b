// SPDX-License-Identifier: MIT OR Apache-2.0
//! Events as lines of the log.

use crate::log::{tell, LogContext};
use control::stats::Streaming;
use control::supervisor::What;
use control::tapdisk::Call;

/// Returns the log context of an event: fields of the event take precedence over the present state of the disk.
pub(super) fn with(about: LogContext, what: &What) -> LogContext {
    let pid = match what {
        What::Died { pid, .. } | What::Hung { pid, .. } | What::Started { pid } => Some(*pid),
        What::Kept { pid, .. } => *pid,
        What::HandedOff(handed) => Some(handed.to),
        _ => None,
    };
    let errno = match what {
        What::Trouble { trouble, .. } => Some(trouble.errno),
        _ => None,
    };
    LogContext {
        pid: pid.or(about.pid),
        errno: errno.or(about.errno),
        event: name(what),
        ..about
    }
}

/// The name of an event in the protocol.
fn name(what: &What) -> Option<String> {
    let value = serde_json::to_value(what).ok()?;
    Some(value.get("event")?.as_str()?.to_owned())
}

/// Writes a line about an event.
pub(super) fn write(about: &LogContext, what: &What) {
    let disk = about
        .minor
        .map_or_else(|| "a process".to_owned(), |minor| format!("disk {minor}"));
    match what {
        What::Died { pid, how } => tell!(warn, about, "{disk}: tapdisk {pid} {how}"),
        What::Trouble {
            trouble,
            target,
            error,
            more,
            stopped,
        } => {
            let image = target
                .as_ref()
                .map_or("its image".into(), ToString::to_string);
            let minor = about
                .minor
                .map_or("MINOR".into(), |minor| minor.to_string());
            let waits = format!("; the guest waits: repair the image's storage, then resume the disk: `tap-ctl unpause -m {minor}`");
            let then = match stopped {
                true => waits.as_str(),
                false if trouble.what == Call::Flush => {
                    "; earlier writes may be lost, and a Linux guest takes this for a disk that cannot flush, and \
                     flushes no more: see to the storage, then detach and attach the disk, or restart the guest"
                }
                false => "; the guest got the error",
            };
            tell!(error, about, "{disk}: {} of {} bytes at {} of {image} failed: {error}; {more} more failed since the last report{then}",
                trouble.what,
                trouble.len,
                trouble.offset
            );
        }
        What::Failed { message, retry_ms } => {
            tell!(
                warn,
                about,
                "{disk}: {message}; the next attempt is in {retry_ms} ms"
            );
        }
        What::HandedOff(handed) => tell!(
            info,
            about,
            "{disk}: served by tapdisk {} of {} now; no process served it for {} us",
            handed.to,
            handed.program.display(),
            handed.pause_us
        ),
        What::Kept {
            pid: Some(pid),
            why,
        } => {
            tell!(
                warn,
                about,
                "{disk}: tapdisk {pid} serves on, and no new one: {why}"
            );
        }
        What::Kept { pid: None, why } => {
            tell!(warn, about, "{disk}: not handed to a new process: {why}");
        }
        What::Snapshot(taken) => tell!(
            info,
            about,
            "{disk}: switched to {} over {}; its configuration must name the new image from now on",
            taken.target,
            taken.parent.display()
        ),
        What::SnapshotUndone { why } => {
            tell!(
                warn,
                about,
                "{disk}: no snapshot was made, it keeps its image: {why}"
            );
        }
        What::Streamed { target, outcome } => match outcome {
            Streaming::Failed { .. } => tell!(warn, about, "{disk}: {}", outcome.told(target)),
            _ => tell!(info, about, "{disk}: {}", outcome.told(target)),
        },
        What::Moved(moved) => tell!(info, about, "{disk}: {}", moved.told()),
        What::Mirrored { target, outcome } => {
            tell!(warn, about, "{disk}: {}", outcome.told(target));
        }
        What::Unmarked { why } => tell!(
            warn,
            about,
            "{disk}: its dirty bitmaps are lost, so the next backup has to be a full one: {why}"
        ),
        What::Untraced { path, why } => {
            tell!(
                warn,
                about,
                "{disk}: its trace in {} has ended: {why}",
                path.display()
            );
        }
        What::Hung {
            pid,
            for_ms,
            killed,
        } => {
            let then = if *killed { "killed" } else { "not killed" };
            tell!(
                warn,
                about,
                "{disk}: tapdisk {pid} has not answered for {for_ms} ms: {then}"
            );
        }
        What::Poisoned { request, count } => {
            let request = request
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default();
            tell!(error, about, "{disk}: a request made its processes die ({request}): the request failed, and the guest got the error; {count} so far"
            );
        }
        What::Created {
            target: Some(target),
        } => tell!(info, about, "{disk}: made for {target}"),
        What::Created { target: None } => tell!(info, about, "{disk}: made"),
        What::Started { pid } => tell!(info, about, "{disk}: served by tapdisk {pid}"),
        What::Paused => tell!(info, about, "{disk}: paused"),
        What::Unpaused => tell!(info, about, "{disk}: resumed"),
        What::Inactive => tell!(
            info,
            about,
            "{disk}: released its image, because the guest is suspended"
        ),
        What::Active => tell!(info, about, "{disk}: opened its image again and resumed"),
        What::Held { why } => tell!(error, about, "{disk}: the guest waits: {why}"),
        What::Resized { size } => tell!(info, about, "{disk}: now has {size} bytes"),
        What::Unknown { why } => tell!(error, about, "{disk}: ignored: {why}"),
        What::Refused { why } => tell!(warn, about, "{why}"),
        What::NotDirect { why } => {
            tell!(
                warn,
                about,
                "{disk}: no passthrough, the process serves all requests: {why}"
            );
        }
        What::Reconnected { path } => {
            tell!(warn, about, "{disk}: connected to {} again", path.display())
        }
        What::Destroyed => tell!(info, about, "{disk}: destroyed"),
        // It says itself with which settings it begins.
        What::Began { .. } | What::Lost { .. } | What::Renumbered | What::Other => {}
    }
}
