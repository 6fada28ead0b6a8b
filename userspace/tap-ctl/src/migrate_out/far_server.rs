// SPDX-License-Identifier: MIT OR Apache-2.0
//! The server of an image on the other host, and the tunnel to it.
//!
//! One ssh is both. It outlives this program, as the server outlives ssh: a guest depends on them, so they end by a word of
//! this program only.

use super::plan::MovingDisk;
use super::record;
use crate::complain;
use control::{Code, Failure, Target};
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Folder of the servers' sockets on the other host.
const FOLDER: &str = "/run/xentap/move";

/// The longest name of a socket without its folder; the kernel's limit is 108 for both.
const LONGEST: usize = 80;

/// Runs on the other host. Its lock is held as long as the server lives, so its number is the server's if the lock is
/// held. When the standard input ends without a word, the server stays.
const SCRIPT: &str = r#"set -eu
how=$1 image=$2 path=$3 size=$4 sector=$5 socket=$6
umask 077
mkdir -p "${socket%/*}"
if flock -n "$socket.lock" true; then
	case "$how" in
	new|replace)
		if [ -b "$path" ]; then
			[ "$how" = replace ] || { echo "$path is a block device, whose content would be lost: --overwrite" >&2; exit 3; }
		else
			force=
			[ "$how" = new ] || force=--force
			tapimg create $force --sector-size "$sector" "$image" "$size" >&2
		fi ;;
	esac
	rm -f "$socket" "$socket.ended"
	(
		sh -c 'echo $$ >"$1.number"; exec flock --no-fork -n "$1.lock" tapimg serve --write --export disk "$2" "$1"' \
			sh "$socket" "$image" </dev/null >"$socket.log" 2>&1
		echo $? >"$socket.ended"
	) </dev/null >/dev/null 2>&1 &
	until [ -S "$socket" ]; do
		if [ -e "$socket.ended" ]; then
			cat "$socket.log" >&2
			exit 1
		fi
		sleep 0.1
	done
fi
echo ready
if read -r word; then
	kill "$(cat "$socket.number")"
fi
# The server that this script has started, if it has, and one of a run before.
wait
flock "$socket.lock" rm -f "$socket.number" "$socket.log" "$socket.ended" "$socket"
echo ended
"#;

/// The other host.
#[derive(Debug)]
pub(super) struct FarHost {
    ssh: Vec<String>,
    host: String,
}

/// An image that the other host serves, to a port of this one.
#[derive(Debug)]
pub(super) struct FarServer {
    ssh: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    /// Prints its messages.
    messages: Option<JoinHandle<()>>,
    host: String,
    pub(super) port: u16,
    pub(super) disk: MovingDisk,
}

/// Returns the path of a server's socket, which two images share only if one word of 80 characters ends both.
fn socket_of(image: &Path) -> String {
    let plain = |c: char| match c.is_ascii_alphanumeric() || "._".contains(c) {
        true => c,
        false => '-',
    };
    let name: Vec<char> = image.display().to_string().chars().map(plain).collect();
    let name: String = name[name.len().saturating_sub(LONGEST)..].iter().collect();
    format!("{FOLDER}/{name}.sock")
}

impl FarHost {
    /// The host that this command reaches.
    pub(super) fn new(ssh: &str, host: &str) -> FarHost {
        FarHost {
            ssh: ssh.split_whitespace().map(str::to_owned).collect(),
            host: host.to_owned(),
        }
    }

    /// Makes an image, and has it served.
    ///
    /// # Errors
    /// The host is not reached, or the image cannot be made or served.
    pub(super) fn serve(&self, disk: &MovingDisk, overwrite: bool) -> Result<FarServer, Failure> {
        let how = if overwrite { "replace" } else { "new" };
        self.start(how, disk, free_port()?)
    }

    /// Makes the tunnel to an image again, and serves it if it is not served any more.
    ///
    /// # Errors
    /// The host is not reached, or the image cannot be served.
    pub(super) fn serve_again(&self, disk: &MovingDisk, port: u16) -> Result<FarServer, Failure> {
        self.start("again", disk, port)
    }

    fn start(&self, how: &str, disk: &MovingDisk, port: u16) -> Result<FarServer, Failure> {
        let has_tunnel = has_tunnel(port)?;
        let (size, sector) = (disk.size.to_string(), disk.sector_size.to_string());
        let (path, socket) = (disk.path.display().to_string(), socket_of(&disk.path));
        let words = [how, &disk.image, &path, &size, &sector, &socket];
        let mut line = format!("sh -c {} sh", quoted(SCRIPT));
        for word in words {
            line.push(' ');
            line.push_str(&quoted(word));
        }
        let (program, options) = self.ssh.split_first().ok_or_else(|| {
            Failure::invalid("--ssh names no program: leave it out, or name a program such as ssh")
        })?;
        let mut ssh = Command::new(program);
        ssh.args(options);
        for option in [
            "BatchMode=yes",
            "ExitOnForwardFailure=yes",
            "ServerAliveInterval=15",
        ] {
            ssh.args(["-o", option]);
        }
        if !has_tunnel {
            ssh.args(["-L", &format!("127.0.0.1:{port}:{socket}")]);
        }
        ssh.args([&self.host, &line])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Not this program's own: ssh outlives it, and would keep its reader waiting.
            .stderr(Stdio::piped())
            // Ctrl-C at this program must not end what the guest depends on.
            .process_group(0);
        let cannot = |error: io::Error| Failure::system(format!("cannot start {program}"), &error);
        let mut child = ssh.spawn().map_err(cannot)?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let messages = child.stderr.take().map(|stderr| {
            thread::spawn(move || {
                let lines = BufReader::new(stderr).lines();
                lines.map_while(Result::ok).for_each(|line| complain(&line));
            })
        });
        let stdout = stdout.ok_or_else(|| Failure::new(Code::System, "ssh has no output"))?;
        let mut server = FarServer {
            ssh: child,
            stdin,
            stdout: BufReader::new(stdout),
            messages,
            host: self.host.clone(),
            port,
            disk: disk.clone(),
        };
        server.wait_ready()?;
        Ok(server)
    }
}

impl FarServer {
    /// Returns the target that leads to the export.
    pub(super) fn target(&self) -> Result<Target, Failure> {
        record::target(self.port)
    }

    fn wait_ready(&mut self) -> Result<(), Failure> {
        let mut line = String::new();
        let read = self.stdout.read_line(&mut line);
        if read.is_ok() && line.trim_end() == "ready" {
            return Ok(());
        }
        let ended = self.ssh.wait();
        if let Some(messages) = self.messages.take() {
            // A panic there has its own message.
            let _ = messages.join();
        }
        let how = ended.map_or_else(|error| error.to_string(), |status| status.to_string());
        Err(Failure::new(
            Code::System,
            format!(
                "{} does not serve {} (its messages are above; {how}). Try `ssh {} tapimg --version`: this host's root \
                 must reach it without a password, and it needs this driver's programs",
                self.host, self.disk.image, self.host
            ),
        ))
    }

    /// Whether it has got the word to end.
    pub(super) fn is_ending(&self) -> bool {
        self.stdin.is_none()
    }

    /// Tells the server to end, without waiting for that.
    pub(super) fn tell_end(&mut self) -> Result<(), Failure> {
        let Some(mut stdin) = self.stdin.take() else {
            return Ok(());
        };
        let told = stdin.write_all(b"end\n").and_then(|()| stdin.flush());
        told.map_err(|error| {
            Failure::system(format!("the tunnel to {} is broken", self.host), &error)
        })
    }

    /// Waits for the end of the server, whose image is durable and free then.
    ///
    /// # Errors
    /// The tunnel broke before the server's end was known.
    pub(super) fn wait_end(&mut self) -> Result<(), Failure> {
        let mut rest = String::new();
        let read = self.stdout.read_to_string(&mut rest);
        let status = self.ssh.wait();
        let has_ended = read.is_ok() && rest.trim_end() == "ended";
        if has_ended && status.is_ok_and(|status| status.success()) {
            return Ok(());
        }
        Err(Failure::new(
            Code::System,
            format!(
                "{} has not said that it serves {} no more",
                self.host, self.disk.image
            ),
        ))
    }

    /// Ends the server.
    ///
    /// # Errors
    /// The server may still run.
    pub(super) fn stop(mut self) -> Result<(), Failure> {
        self.tell_end()?;
        self.wait_end()
    }
}

/// Returns a port of this host that no program has.
fn free_port() -> Result<u16, Failure> {
    let port = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    let port = port.map_err(|error| Failure::system("there is no free TCP port", &error))?;
    Ok(port.port())
}

/// Whether the tunnel of a run before this one serves the port. Waits for the end of one that is broken, which ssh finds
/// out after a while.
///
/// # Errors
/// Something else has the port.
fn has_tunnel(port: u16) -> Result<bool, Failure> {
    const PATIENCE: Duration = Duration::from_secs(90);
    let begun = Instant::now();
    loop {
        match TcpListener::bind(("127.0.0.1", port)) {
            Ok(_) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(Failure::system(format!("TCP port {port}"), &error)),
        }
        if is_greeted(port).unwrap_or(false) {
            return Ok(true);
        }
        if begun.elapsed() >= PATIENCE {
            return Err(Failure::new(
                Code::Busy,
                format!(
                    "TCP port {port} of this host, at which the disk is to be served, belongs to a program that serves no \
                     disk: `ss --listening --tcp --processes` shows which"
                ),
            ));
        }
        thread::sleep(Duration::from_secs(1));
    }
}

/// Whether an NBD server answers at the port.
fn is_greeted(port: u16) -> io::Result<bool> {
    const LIMIT: Duration = Duration::from_secs(5);
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut greeting = [0; 8];
    stream.read_exact(&mut greeting)?;
    Ok(greeting == *b"NBDMAGIC")
}

/// Returns a word of a shell's line.
fn quoted(word: impl AsRef<OsStr>) -> String {
    let word = word.as_ref().to_string_lossy();
    format!("'{}'", word.replace('\'', r"'\''"))
}
