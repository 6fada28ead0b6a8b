// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl migrate-out` with a real tapimg on "another host", which is a folder here: ssh and xl are fakes, the export
//! and its end are not.

mod host;
#[path = "../common/rows.rs"]
mod rows;
#[path = "../backup/tapimg.rs"]
mod tapimg;

use host::{bytes, is_export, HostState, SIZE};
use jsonpages::JsonPages;
use serde_json::Value;
use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tapimg::{tapimg, tapimg_program};

const FAKES: [(&str, &str); 3] = [
    ("ssh", include_str!("fakes/ssh")),
    ("tunnel", include_str!("fakes/tunnel")),
    ("xl", include_str!("fakes/xl")),
];

/// Two hosts, and a guest with two disks.
struct TwoHosts {
    dir: tempfile::TempDir,
    state: Arc<Mutex<HostState>>,
}

impl TwoHosts {
    fn new() -> TwoHosts {
        // The path of a unix socket is short.
        let dir = tempfile::tempdir_in("/tmp").expect("a folder");
        for name in ["near/srv", "near/root", "far/srv", "far/run", "at"] {
            fs::create_dir_all(dir.path().join(name)).expect("a folder");
        }
        let state = Arc::new(Mutex::new(HostState::default()));
        let hosts = TwoHosts { dir, state };
        for (name, text) in FAKES {
            let file = hosts.path("at").join(name);
            fs::write(&file, text).expect("written");
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("chmod");
        }
        let link = hosts.path("at").join("tapimg");
        std::os::unix::fs::symlink(tapimg_program(), link).expect("a link");
        hosts.state().suspended = hosts.path("at/suspended");
        for (name, device) in [("a.img", 51712), ("b.img", 51728)] {
            let own = hosts.path("near/srv").join(name);
            let byte = |at: u64| (at / 512 + u64::from(device)) as u8;
            let content: Vec<u8> = (0..SIZE).map(byte).collect();
            fs::write(&own, content).expect("written");
            hosts.state().add(own, device);
        }
        host::serve(&hosts.path("socket"), hosts.state.clone());
        hosts
    }

    fn state(&self) -> MutexGuard<'_, HostState> {
        self.state.lock().expect("the state")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, options: &str) -> Output {
        let at = self.path("at");
        let mut state = self.state();
        let child = Command::new(env!("CARGO_BIN_EXE_tap-ctl"))
            .args(["--patience", "5", "--socket"])
            .arg(self.path("socket"))
            .arg("--root")
            .arg(self.path("near/root"))
            .args(["migrate-out", "3"])
            .args(options.split(' '))
            .arg("--ssh")
            .arg(at.join("ssh"))
            .arg("--xl")
            .arg(at.join("xl"))
            .env("AT", &at)
            .env("NEAR", self.path("near"))
            .env("FAR", self.path("far"))
            .env(
                "PATH",
                format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", at.display()),
            )
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        state.program = Some(child.id());
        drop(state);
        let output = child.wait_with_output().expect("it ends");
        let printed = String::from_utf8_lossy(&output.stdout);
        JsonPages::check_line("tap-ctl", &format!("migrate-out {options}"), &printed);
        output
    }

    fn good(&self, options: &str) -> Value {
        let output = self.run(&format!("{options} --json"));
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// Returns the message of a run that must fail.
    fn bad(&self, options: &str) -> String {
        let output = self.run(options);
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).expect("text")
    }

    fn xl_fails(&self, how: &str) {
        fs::write(self.path("at/xl-fails"), how).expect("written");
    }

    fn calls_of_xl(&self) -> usize {
        let text = fs::read_to_string(self.path("at/xl.calls")).unwrap_or_default();
        text.lines()
            .filter(|line| line.starts_with("migrate"))
            .count()
    }

    /// Both images on the other host have the content of those here.
    fn same_there(&self) {
        for disk in &self.state().disks {
            let name = disk.own.file_name().expect("a name");
            let there = self.path("far/srv").join(name);
            assert!(bytes(&there) == bytes(&disk.own), "{}", there.display());
        }
    }

    /// All disks are served from the other host, through the tunnels.
    fn served_there(&self) {
        for disk in &self.state().disks {
            let text = disk.target.to_string();
            assert!(is_export(disk), "{text}");
            let address = text.strip_prefix("nbd://").expect("an address");
            let address = address.split('/').next().expect("a port");
            let mut stream = TcpStream::connect(address).unwrap_or_else(|error| {
                let log = fs::read_to_string(self.path("at/tunnel.log"));
                panic!("{text}: {error}: {log:?}")
            });
            let mut greeting = [0; 8];
            stream.read_exact(&mut greeting).expect("a server");
            assert_eq!(&greeting, b"NBDMAGIC");
        }
    }

    /// No server and no tunnel is left, nor what a further run would need.
    fn nothing_left(&self) {
        let limit = Instant::now() + Duration::from_secs(10);
        let others = || {
            let files = fs::read_dir(self.path("far/run")).expect("a folder");
            let files = files.map(|file| file.expect("a file").path());
            files
                .filter(|file| file.extension().is_none_or(|end| end != "lock"))
                .count()
        };
        while others() > 0 {
            assert!(
                Instant::now() < limit,
                "{} files of servers are left",
                others()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        for lock in fs::read_dir(self.path("far/run")).expect("a folder") {
            let lock = lock.expect("a file").path();
            let mut free = Command::new("flock");
            free.args(["-w", "5"]).arg(&lock).arg("true");
            assert!(free.status().expect("flock").success(), "{lock:?}");
        }
        let records = self.path("near/root/run/xentap/move");
        let records = fs::read_dir(records).map_or(0, |files| files.count());
        assert_eq!(records, 0);
        let ssh = fs::read_to_string(self.path("at/ssh.calls")).unwrap_or_default();
        for pid in ssh.lines().filter_map(|line| line.split(' ').next()) {
            while PathBuf::from(format!("/proc/{pid}")).exists() {
                assert!(Instant::now() < limit, "ssh {pid} still runs");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

impl Drop for TwoHosts {
    /// Ends servers that a failed test has left.
    fn drop(&mut self) {
        for file in fs::read_dir(self.path("far/run")).into_iter().flatten() {
            let file = file.expect("a file").path();
            if file.extension().is_some_and(|end| end == "number") {
                let number = fs::read_to_string(&file).unwrap_or_default();
                let _ = Command::new("kill").arg(number.trim()).status();
            }
        }
    }
}

#[test]
fn a_guest_moves_with_all_of_its_tap_disks() {
    let hosts = TwoHosts::new();
    let moved = hosts.good("beta");
    assert_eq!(
        (&moved["is"], &moved["version"]),
        (&"migrate-out".into(), &1.into())
    );
    assert_eq!(
        (&moved["guest"], &moved["host"]),
        (&"3".into(), &"beta".into())
    );
    let disks = moved["disks"].as_array().expect("disks");
    let vdevs: Vec<&str> = disks
        .iter()
        .filter_map(|disk| disk["vdev"].as_str())
        .collect();
    assert_eq!(vdevs, ["xvda", "xvdb"]);
    hosts.same_there();
    hosts.nothing_left();
    let xl = fs::read_to_string(hosts.path("at/xl.calls")).expect("xl ran");
    assert_eq!(
        xl,
        format!("migrate -s {} 3 beta\n", hosts.path("at/ssh").display())
    );
}

#[test]
fn a_qcow2_image_becomes_one_there() {
    let hosts = TwoHosts::new();
    let image = hosts.path("near/srv/c.qcow2");
    tapimg(&format!(
        "convert aio:{} qcow2:{}",
        hosts.path("near/srv/a.img").display(),
        image.display()
    ));
    {
        let mut state = hosts.state();
        state.disks.truncate(1);
        // The copy that the fake makes is that of the raw file.
        state.disks[0].target = format!("qcow2:{}", image.display())
            .parse()
            .expect("a target");
    }
    hosts.good("beta");
    let there = hosts.path("far/srv/c.qcow2");
    tapimg(&format!(
        "compare aio:{} qcow2:{}",
        hosts.path("near/srv/a.img").display(),
        there.display()
    ));
    hosts.nothing_left();
}

#[test]
fn an_image_behind_the_page_cache_stays_one() {
    let hosts = TwoHosts::new();
    {
        let mut state = hosts.state();
        let own = state.disks[0].own.display().to_string();
        state.disks[0].target = format!("sync:{own}").parse().expect("a target");
    }
    let moved = hosts.good("beta");
    let image = moved["disks"][0]["image"].as_str();
    assert!(
        image.is_some_and(|image| image.starts_with("sync:/")),
        "{moved}"
    );
    hosts.same_there();
}

#[test]
fn a_migration_that_fails_leaves_the_guest_served_and_can_be_repeated() {
    for when in ["early", "late"] {
        let hosts = TwoHosts::new();
        hosts.xl_fails(when);
        let message = hosts.bad("beta");
        assert!(message.contains("3 stays here"), "{message}");
        assert!(
            message.contains("`tap-ctl migrate-out 3 beta`"),
            "{message}"
        );
        hosts.served_there();
        assert_eq!(hosts.state().mirrors, 2);
        // A copy is not made again, and another host is not meant.
        let message = hosts.bad("gamma");
        assert!(message.contains("it is on beta already"), "{message}");
        fs::remove_file(hosts.path("at/suspended")).ok();
        hosts.xl_fails("");
        hosts.good("beta");
        assert_eq!(hosts.state().mirrors, 2, "{when}");
        hosts.same_there();
        hosts.nothing_left();
    }
}

#[test]
fn a_supervisor_that_ends_during_the_migration_is_followed_by_the_next_one() {
    let hosts = TwoHosts::new();
    hosts.state().restarts = true;
    let output = hosts.run("beta");
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stderr).expect("text");
    assert!(said.contains("waiting for another blktapctrl"), "{said}");
    assert_eq!(hosts.state().subscriptions, 2);
    hosts.same_there();
    hosts.nothing_left();
}

#[test]
fn a_run_that_is_killed_is_continued_by_the_next_one() {
    for mirror in [1, 2] {
        let hosts = TwoHosts::new();
        hosts.state().killed_at = Some(mirror);
        let output = hosts.run("beta");
        assert_eq!(output.status.code(), None, "{output:?}");
        hosts.state().killed_at = None;
        assert_eq!(hosts.calls_of_xl(), 0);
        hosts.good("beta");
        assert_eq!(hosts.state().mirrors, 2);
        hosts.same_there();
        hosts.nothing_left();
    }
}

#[test]
fn a_copy_that_fails_leaves_the_disk_with_its_image() {
    let hosts = TwoHosts::new();
    hosts.state().mirror_fails = true;
    let message = hosts.bad("beta");
    assert!(message.contains("the target does not answer"), "{message}");
    assert!(message.contains("3 xvda keeps its image here"), "{message}");
    assert!(!is_export(&hosts.state().disks[0]));
    assert_eq!(hosts.calls_of_xl(), 0);
    hosts.nothing_left();
    // The new image is there now.
    hosts.state().mirror_fails = false;
    let message = hosts.bad("beta");
    assert!(message.contains("a.img"), "{message}");
    assert_eq!(hosts.state().mirrors, 1);
    hosts.good("beta --overwrite");
    hosts.same_there();
    hosts.nothing_left();
}

#[test]
fn an_image_of_the_other_host_is_kept() {
    let hosts = TwoHosts::new();
    let there = hosts.path("far/srv/b.img");
    fs::write(&there, "precious").expect("written");
    let message = hosts.bad("beta");
    assert!(message.contains("beta does not serve"), "{message}");
    assert_eq!(bytes(&there), b"precious");
    assert_eq!(hosts.calls_of_xl(), 0);
}

#[test]
fn a_host_that_is_not_reached_is_named() {
    let hosts = TwoHosts::new();
    let message = hosts.bad("nowhere");
    assert!(message.contains("Could not resolve"), "{message}");
    assert!(
        message.contains("`ssh nowhere tapimg --version`"),
        "{message}"
    );
    assert_eq!(hosts.state().mirrors, 0);
    hosts.nothing_left();
}

#[test]
fn disks_that_cannot_move_are_named_before_anything_is_done() {
    let refused = [
        ("lease=record,aio:/srv/a.img", "xl migrate` alone"),
        ("nbd://store/a", "xl migrate` alone"),
        ("ram:1M", "only aio:"),
        ("cow:aio:/srv/a.img", "only aio:"),
        ("key=/etc/a.key,luks:/srv/a.img", "encrypted"),
    ];
    for (target, why) in refused {
        let hosts = TwoHosts::new();
        hosts.state().disks[1].target = target.parse().expect("a target");
        let message = hosts.bad("beta");
        assert!(message.contains("3 xvdb cannot be moved"), "{message}");
        assert!(message.contains(why), "{target}: {message}");
        assert!(!hosts.path("at/ssh.calls").exists());
    }
}

#[test]
fn a_configuration_that_names_another_image_is_found() {
    let hosts = TwoHosts::new();
    let folder = hosts.path("near/root/var/lib/xen");
    fs::create_dir_all(&folder).expect("a folder");
    let copy = |image: &str| {
        let text = format!(
            r#"{{"disks":[{{"pdev_path":"aio:{image}","vdev":"xvda","script":"block-tap-rs","readwrite":1}}]}}"#
        );
        fs::write(folder.join("userdata-d.3.0a.libxl-json"), text).expect("written");
    };
    copy("/srv/old.img");
    let message = hosts.bad("beta");
    assert!(message.contains("names aio:/srv/old.img"), "{message}");
    assert!(message.contains("xl config-update"), "{message}");
    copy(&hosts.path("near/srv/a.img").display().to_string());
    hosts.good("beta");
}
