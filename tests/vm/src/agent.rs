// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The first process of a guest, or a service of one that has a system of its own: executes commands that come over
//! the console. As the first process it loads the modules before that.
//!
//! The protocol is lines. `PING n` is answered by `PONG n`. `RUN id command` starts a shell command and
//! returns at once; its output comes as `OUT id text`, its end as `DONE id status`. Commands run side by
//! side, so that a disk can be detached, saved or destroyed while another command loads it.

use anyhow::{bail, Context, Result};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

/// The device that carries the protocol; a PV and a PVH guest both have it.
const CONSOLE: &str = "/dev/hvc0";

type SerialLine = Arc<Mutex<File>>;

/// Serves until the machine goes down, as its first process.
pub(crate) fn main() -> Result<()> {
    or_say(prepare().and_then(|()| serve()))
}

/// Serves as a program of a system whose init has prepared everything.
pub(crate) fn in_system() -> Result<()> {
    or_say(serve())
}

/// Prints the error with which it ends, because no program sees the status of a first process.
fn or_say(served: Result<()>) -> Result<()> {
    served.inspect_err(|error| eprintln!("agent: {error:#}"))
}

/// Does the work of an init before it starts other programs.
fn prepare() -> Result<()> {
    mount("proc", "/proc", "proc")?;
    mount("sysfs", "/sys", "sysfs")?;
    mount("devtmpfs", "/dev", "devtmpfs")?;
    install_busybox()?;
    let cmdline = fs::read_to_string("/proc/cmdline").context("cannot read /proc/cmdline")?;
    load_modules(Path::new("/mod"), &module_parameters(&cmdline))
}

fn serve() -> Result<()> {
    // Kernel messages would tear the protocol's lines apart; a panic or an oops raises the level again.
    // SAFETY: the call takes no pointer that it uses for this action (8 sets the console level).
    unsafe { libc::klogctl(8, std::ptr::null_mut(), 1) };
    let console = File::options()
        .read(true)
        .write(true)
        .open(CONSOLE)
        .context("cannot open the console")?;
    make_raw(&console)?;
    let line = Arc::new(Mutex::new(
        console
            .try_clone()
            .context("cannot duplicate the console")?,
    ));
    say(&line, "PONG 0");
    for request in BufReader::new(console).lines() {
        answer(&line, request.context("cannot read the console")?.trim());
    }
    bail!("the console ended")
}

fn mount(source: &str, target: &str, kind: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("cannot create {target}"))?;
    let (source, path, kind) = (
        CString::new(source)?,
        CString::new(target)?,
        CString::new(kind)?,
    );
    // SAFETY: the three strings live across the call and the data pointer may be null.
    let rc = unsafe {
        libc::mount(
            source.as_ptr(),
            path.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    let error = std::io::Error::last_os_error();
    if rc != 0 && error.raw_os_error() != Some(libc::EBUSY) {
        bail!("cannot mount {target}: {error}");
    }
    Ok(())
}

fn install_busybox() -> Result<()> {
    std::env::set_var("PATH", "/bin:/sbin:/usr/bin:/usr/sbin");
    let status = Command::new("/bin/busybox")
        .args(["--install", "-s", "/bin"])
        .status();
    if !status
        .context("cannot start /bin/busybox: put it into the guest's initramfs")?
        .success()
    {
        bail!("busybox could not install its commands in /bin");
    }
    Ok(())
}

/// The parameters `module.name=value` of a kernel command line, by module.
fn module_parameters(cmdline: &str) -> BTreeMap<String, String> {
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    for word in cmdline.split_whitespace() {
        let Some((key, value)) = word.split_once('=') else {
            continue;
        };
        if let Some((module, name)) = key.split_once('.') {
            let all = found.entry(module.replace('-', "_")).or_default();
            all.push_str(&format!("{name}={value} "));
        }
    }
    found
}

/// Loads every file of the directory in the order of the names (`07-xen-blkfront.ko`).
fn load_modules(dir: &Path, parameters: &BTreeMap<String, String>) -> Result<()> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .collect();
    files.sort();
    for file in files {
        let stem = file
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let name = stem
            .trim_start_matches(|c: char| c.is_ascii_digit() || c == '-')
            .replace('-', "_");
        let arguments = CString::new(parameters.get(&name).map_or("", |text| text.trim()))?;
        let image = File::open(&file).with_context(|| format!("cannot open {}", file.display()))?;
        // SAFETY: the descriptor and the string are valid across the call.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_finit_module,
                image.as_raw_fd(),
                arguments.as_ptr(),
                0,
            )
        };
        if rc == 0 {
            continue;
        }
        let error = std::io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EEXIST) => {}
            // A driver for a faster instruction: ext4 of Linux 6.1 requests it, and works without.
            Some(libc::ENODEV) => eprintln!("agent: {} is not for this machine", file.display()),
            _ => bail!("cannot load {}: {error}", file.display()),
        }
    }
    Ok(())
}

/// Bytes pass unchanged in both directions, without echo.
fn make_raw(tty: &File) -> Result<()> {
    // SAFETY: all-zero bytes are a valid termios, which tcgetattr then fills.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the structure is ours.
    if unsafe { libc::tcgetattr(tty.as_raw_fd(), &mut settings) } != 0 {
        bail!(
            "the console is no terminal: {}",
            std::io::Error::last_os_error()
        );
    }
    // SAFETY: as above.
    unsafe { libc::cfmakeraw(&mut settings) };
    // SAFETY: as above.
    if unsafe { libc::tcsetattr(tty.as_raw_fd(), libc::TCSANOW, &settings) } != 0 {
        bail!(
            "cannot set the console to raw: {}",
            std::io::Error::last_os_error()
        );
    }
    Ok(())
}

fn answer(line: &SerialLine, request: &str) {
    let mut words = request.splitn(3, ' ');
    match (words.next(), words.next(), words.next()) {
        (Some("PING"), Some(number), None) => say(line, &format!("PONG {number}")),
        (Some("RUN"), Some(id), Some(command)) => {
            let (line, id, command) = (Arc::clone(line), id.to_owned(), command.to_owned());
            std::thread::spawn(move || execute(&line, &id, &command));
        }
        // A line that was typed before the terminal became raw may arrive torn.
        _ => (),
    }
}

fn execute(line: &SerialLine, id: &str, command: &str) {
    let script = format!("exec 2>&1; {command}");
    let child = Command::new("/bin/sh")
        .args(["-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            say(line, &format!("OUT {id} cannot start the shell: {error}"));
            return say(line, &format!("DONE {id} 127"));
        }
    };
    if let Some(output) = child.stdout.take() {
        for text in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            say(
                line,
                &format!("OUT {id} {}", String::from_utf8_lossy(&text).trim_end()),
            );
        }
    }
    let code = child
        .wait()
        .ok()
        .and_then(|status| status.code())
        .unwrap_or(255);
    say(line, &format!("DONE {id} {code}"));
}

/// Prints one line, in one piece.
fn say(line: &SerialLine, text: &str) {
    let mut console = line
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Err(error) = console.write_all(format!("{text}\n").as_bytes()) {
        eprintln!("agent: cannot write to the console: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::module_parameters;

    #[test]
    fn parameters_are_sorted_by_module() {
        let found = module_parameters(
            "console=hvc0 xen_blkfront.max_queues=4 xen-blkfront.max_ring_page_order=2 a.b=c",
        );
        assert_eq!(
            found["xen_blkfront"].trim(),
            "max_queues=4 max_ring_page_order=2"
        );
        assert_eq!(found["a"].trim(), "b=c");
        assert!(!found.contains_key("console"));
    }
}
