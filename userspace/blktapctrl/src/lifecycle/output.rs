// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writes what a process says to the log, as a line about its disk.

use crate::log::tell;
use crate::process::{Output, Process};
use crate::registry::Registry;
use std::convert::Infallible;
use std::time::Duration;

/// Time between two reads of a process' output, so that a process that prints too much does not keep the supervisor
/// busy; it does not have to wait either.
const PAUSE: Duration = Duration::from_millis(100);

/// Logs what a process says until it has ended, and says how it has ended.
pub(super) async fn log_until_end(registry: &Registry, process: &Process) -> String {
    let line = |text: &str| log(registry, process, text);
    let mut output = match process.output() {
        Ok(output) => output,
        Err(error) => {
            unheard(registry, process, &error);
            None
        }
    };
    let listen = async {
        if let Some(output) = &mut output {
            if let Err(error) = listen(output, line).await {
                unheard(registry, process, &error);
            }
        }
        std::future::pending::<Infallible>().await
    };
    let how = tokio::select! {
        how = process.ended() => how,
        never = listen => match never {},
    };
    // Its last lines come before the report of its end.
    if let Some(Err(error)) = output.as_mut().map(|output| output.rest(line)) {
        unheard(registry, process, &error);
    }
    how
}

/// Listens until there will be nothing more.
async fn listen(output: &mut Output, line: impl Fn(&str)) -> std::io::Result<()> {
    while output.read(&line).await? {
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

fn log(registry: &Registry, process: &Process, text: &str) {
    let (about, pid) = (registry.about(process), process.pid());
    let of = about.minor.map(|minor| format!("disk {minor}: "));
    let of = of.unwrap_or_default();
    tell!(warn, about, said = true, "{of}tapdisk {pid}: {text}");
}

fn unheard(registry: &Registry, process: &Process, error: &std::io::Error) {
    let (about, pid) = (registry.about(process).because(error), process.pid());
    tell!(
        warn,
        about,
        "the output of tapdisk {pid} is not read any more: {error}"
    );
}
