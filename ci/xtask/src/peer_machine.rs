// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A second machine beside the tested one: the tests may shut it down, and it comes back.

use crate::artifacts::Machines;
use crate::machine::{Machine, MachineHost};
use crate::run;
use anyhow::{bail, ensure, Context, Result};
use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// Interval between checks whether it has gone down.
const LOOK: Duration = Duration::from_millis(100);
/// Number of shutdowns without a boot after which it counts as broken.
const ENOUGH: u32 = 20;

/// Boots a machine again and again, until `end` gets a message or is dropped. A sign of a kernel fault on any of its
/// consoles is an error.
pub(crate) fn keep(
    machine: &Machine,
    machines: &Machines,
    payload: &Path,
    end: &Receiver<()>,
) -> Result<()> {
    let cable = machine.cable.as_ref();
    let cable = cable.context("the machine has no network")?;
    ensure!(
        cable.host == MachineHost::Second,
        "the machine is not the second one"
    );
    let (dir, _folder) = machine.prepare(payload)?;
    let console = dir.join("console.log");
    // It waits for its turn, and this machine would have the processors in the time until then.
    while !cable.has_first() {
        match end.recv_timeout(LOOK) {
            Err(RecvTimeoutError::Timeout) => (),
            Ok(()) | Err(RecvTimeoutError::Disconnected) => {
                bail!("the first machine never came up")
            }
        }
    }
    for _ in 0..ENOUGH {
        let mut qemu = machine.qemu(machines, &dir);
        qemu.args(["-monitor", "none", "-chardev"]);
        qemu.args(["file,id=console,append=on,path=/mnt/b/console.log"]);
        qemu.args(["-serial", "chardev:console"]);
        qemu.args(["-chardev", "file,id=report,append=on,path=/mnt/b/report"]);
        qemu.stdin(Stdio::null()).stdout(Stdio::null());
        qemu.stderr(File::create(dir.join("qemu.log"))?);
        let mut child = run::start(&mut qemu)?;
        loop {
            if let Some(status) = child.try_wait()? {
                let complaint = fs::read_to_string(dir.join("qemu.log"))?;
                ensure!(
                    status.success(),
                    "QEMU of the second machine failed ({status}): {complaint}"
                );
                break;
            }
            match end.recv_timeout(LOOK) {
                Err(RecvTimeoutError::Timeout) => (),
                Ok(()) | Err(RecvTimeoutError::Disconnected) => {
                    child.kill().context("cannot end the second machine")?;
                    child.wait()?;
                    return judge(&console);
                }
            }
        }
    }
    judge(&console)?;
    bail!(
        "the second machine went down {ENOUGH} times; its log is {}",
        console.display()
    )
}

fn judge(console: &Path) -> Result<()> {
    let log = String::from_utf8_lossy(&fs::read(console)?).into_owned();
    let splats = trouble::in_console(&log);
    match splats.first() {
        None => Ok(()),
        Some(first) => bail!(
            "a kernel or Xen of the second machine complained ({} lines), first: {first}; the whole log is {}",
            splats.len(),
            console.display()
        ),
    }
}
