// SPDX-License-Identifier: MIT OR Apache-2.0
//! A host of the tests, and the cluster that several share.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The script, its parts, and the one that stands in for Xen's.
const SCRIPTS: [&str; 5] = [
    "block-tap-rs",
    "block-shared-storage",
    "block-shared-rbd",
    "block-shared-drbd",
    "block-or-tap",
];

/// Storage that hosts share.
pub(crate) struct SharedCluster {
    dir: tempfile::TempDir,
}

impl SharedCluster {
    /// Makes a cluster with the image `vms/web`, and the resource `r0` in sync between alpha and beta.
    pub(crate) fn new() -> SharedCluster {
        let cluster = SharedCluster {
            dir: tempfile::tempdir().expect("a folder"),
        };
        cluster.image("vms/web", "layering,exclusive-lock,object-map,fast-diff");
        let minors = "0 0\n";
        cluster.write("drbd/r0/volumes", minors);
        cluster.write("drbd/r0/connection", "Connected\n");
        for host in ["alpha", "beta"] {
            cluster.write(&format!("drbd/r0/role.{host}"), "Secondary\n");
            cluster.write(&format!("drbd/r0/disk.{host}"), "UpToDate\n");
            cluster.write(&format!("drbd/r0/two.{host}"), "no\n");
        }
        cluster
    }

    pub(crate) fn image(&self, name: &str, features: &str) {
        self.write(&format!("images/{name}/features"), features);
    }

    pub(crate) fn write(&self, file: &str, text: &str) {
        write(&self.dir.path().join(file), text);
    }

    /// A file's text; empty if there is none.
    pub(crate) fn read(&self, file: &str) -> String {
        read(&self.dir.path().join(file))
    }

    /// Addresses of the watchers of an image.
    pub(crate) fn watchers(&self, image: &str) -> Vec<String> {
        let folder = self.dir.path().join("images").join(image).join("watchers");
        let Ok(entries) = fs::read_dir(folder) else {
            return Vec::new();
        };
        entries
            .map(|entry| read(&entry.expect("an entry").path()))
            .collect()
    }

    pub(crate) fn host(&self, name: &'static str) -> HostFolder {
        HostFolder::new(self.dir.path(), name)
    }
}

/// A host.
pub(crate) struct HostFolder {
    dir: tempfile::TempDir,
    cluster: PathBuf,
    name: &'static str,
    /// Seconds that the script may take. This machine may be slow.
    limit: Cell<u32>,
}

/// A disk of a guest on a host: the directory of its backend.
#[derive(Clone, Debug)]
pub(crate) struct GuestDisk {
    path: String,
}

impl HostFolder {
    fn new(cluster: &Path, name: &'static str) -> HostFolder {
        let dir = tempfile::tempdir().expect("a folder");
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let (scripts, bin) = (dir.path().join("scripts"), dir.path().join("bin"));
        fs::create_dir(&scripts).expect("a folder");
        for script in SCRIPTS {
            let place = here.join("../../ci/packaging").join(script);
            symlink(place, scripts.join(script)).expect("a link");
        }
        let fakes = here.join("tests/shared_storage/fakes");
        symlink(
            fakes.join("block-common.sh"),
            scripts.join("block-common.sh"),
        )
        .expect("a link");
        write(
            &scripts.join("hotplugpath.sh"),
            &format!("bindir={0}\nsbindir={0}\n", bin.display()),
        );
        write(&scripts.join("block.xen"), "#!/bin/sh\necho block.xen\n");
        fs::set_permissions(scripts.join("block.xen"), fs::Permissions::from_mode(0o755))
            .expect("a script");
        symlink(fakes, &bin).expect("a link");
        HostFolder {
            dir,
            cluster: cluster.into(),
            name,
            limit: Cell::new(300),
        }
    }

    /// Gives the script this time, for tests that wait for its end.
    pub(crate) fn limit(&self, seconds: u32) {
        self.limit.set(seconds);
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Tells xenstore of a guest.
    pub(crate) fn guest(&self, number: u32, name: &str, uuid: &str) {
        self.key(
            &format!("/local/domain/{number}/vm"),
            &format!("/vm/{uuid}"),
        );
        self.key(&format!("/local/domain/{number}/name"), name);
    }

    /// Tells xenstore of a guest's disk, as libxl does before it runs the script.
    pub(crate) fn disk(&self, guest: u32, device: u32, target: &str, mode: &str) -> GuestDisk {
        let disk = GuestDisk {
            path: format!("/local/domain/0/backend/vbd/{guest}/{device}"),
        };
        for (key, value) in [
            ("params", target),
            ("mode", mode),
            ("frontend-id", &guest.to_string()),
            ("state", "2"),
        ] {
            self.key(&format!("{}/{key}", disk.path), value);
        }
        disk
    }

    pub(crate) fn key(&self, key: &str, value: &str) {
        write(&self.path(&format!("store/{key}")), value);
    }

    /// A key of a disk; empty if there is none.
    pub(crate) fn of(&self, disk: &GuestDisk, key: &str) -> String {
        read(&self.path(&format!("store/{}/{key}", disk.path)))
    }

    /// Removes the directory of a disk from xenstore.
    pub(crate) fn forget(&self, disk: &GuestDisk) {
        fs::remove_dir_all(self.path(&format!("store/{}", disk.path))).expect("a directory");
    }

    /// Lets a program fail with a status and a complaint. Its words are joined by `-`, as `device-map`.
    pub(crate) fn fail(&self, words: &str, status: u32, complaint: &str) {
        write(
            &self.path(&format!("fail/{words}")),
            &format!("{status}\n{complaint}\n"),
        );
    }

    /// Undoes [`HostFolder::fail`].
    pub(crate) fn mend(&self, words: &str) {
        fs::remove_file(self.path(&format!("fail/{words}"))).expect("a file");
    }

    /// Lets a program never end.
    pub(crate) fn hang(&self, words: &str) {
        write(&self.path(&format!("hang/{words}")), "");
    }

    /// Returns the command that runs a script for a disk.
    fn command(&self, script: &str, verb: &str, disk: &GuestDisk) -> Command {
        let mut bash = Command::new("bash");
        // The programs kill the script by its number.
        bash.args(["-c", "export BED_SCRIPT=$$; exec \"$@\"", "bash"]);
        bash.arg(self.path("scripts").join(script)).arg(verb);
        self.surround(&mut bash);
        bash.env("XENBUS_PATH", &disk.path)
            .env("XENBUS_TYPE", "vbd")
            .env("XENTAP_RUN", self.path("run"))
            .env("XENTAP_SYS", self.path("sys"))
            .env("STORAGE_TIMEOUT", self.limit.get().to_string());
        bash
    }

    /// Gives a command the programs of this host.
    fn surround(&self, command: &mut Command) {
        let old = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{}:{old}", self.path("bin").display()))
            .env("BED_SCRIPT", std::process::id().to_string())
            .env("BED_HOST", self.dir.path())
            .env("BED_NAME", self.name)
            .env("BED_ADDRESS", format!("{}:0", self.name))
            .env("BED_CLUSTER", &self.cluster);
    }

    /// Runs the tap-ctl of this project, not the stand-in of the script.
    pub(crate) fn tap_ctl(&self, words: &[&str]) -> Output {
        let mut program = Command::new(env!("CARGO_BIN_EXE_tap-ctl"));
        self.surround(program.args(words));
        program.output().expect("tap-ctl")
    }

    pub(crate) fn script(
        &self,
        script: &str,
        verb: &str,
        disk: &GuestDisk,
        settings: &[(&str, &str)],
    ) -> Output {
        let mut bash = self.command(script, verb, disk);
        bash.envs(settings.iter().copied()).output().expect("bash")
    }

    /// Runs `add` and kills it in a program, which takes seconds more: this does not wait for that.
    pub(crate) fn add_that_its_program_outlives(&self, disk: &GuestDisk, words: &str) {
        write(&self.path(&format!("outlives/{words}")), "");
        let mut bash = self.command("block-tap-rs", "add", disk);
        let bash = bash.stdout(Stdio::null()).stderr(Stdio::null());
        let ended = bash.status().expect("bash");
        assert_eq!(ended.code(), None, "it was killed");
        assert!(!self.path("outlived").exists(), "its program has ended");
    }

    /// Waits until the program has ended that has outlived its script.
    pub(crate) fn wait_for_its_program(&self) {
        let end = Instant::now() + Duration::from_secs(120);
        while !self.path("outlived").exists() {
            assert!(Instant::now() < end, "the program does not end");
            sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn add(&self, disk: &GuestDisk) -> Output {
        self.script("block-tap-rs", "add", disk, &[])
    }

    pub(crate) fn remove(&self, disk: &GuestDisk) -> Output {
        self.script("block-tap-rs", "remove", disk, &[])
    }

    /// Attaches a disk, and returns its device.
    ///
    /// # Panics
    /// The script refuses it.
    pub(crate) fn attach(&self, disk: &GuestDisk) -> String {
        let said = self.add(disk);
        assert_eq!(
            self.of(disk, "hotplug-status"),
            "connected",
            "{} {said:?}\n{}",
            self.of(disk, "hotplug-error"),
            self.calls()
        );
        assert!(said.status.success(), "{said:?}");
        self.of(disk, "physical-device-path")
    }

    /// Attaches a disk that the script must refuse, and returns its reason. Nothing is left of the attempt.
    ///
    /// # Panics
    /// The script attaches it, or leaves something.
    pub(crate) fn refused(&self, disk: &GuestDisk) -> String {
        let (mapped, records) = (self.mappings(), self.records());
        let said = self.add(disk);
        let status = self.of(disk, "hotplug-status");
        assert!(!said.status.success(), "{status} {said:?}");
        assert!(
            ["error", "busy"].contains(&status.as_str()),
            "{status} {said:?}"
        );
        assert_eq!(self.of(disk, "physical-device"), "");
        assert_eq!(self.mappings(), mapped);
        assert_eq!(self.records(), records);
        self.of(disk, "hotplug-error")
    }

    /// Detaches a disk.
    ///
    /// # Panics
    /// The script fails.
    pub(crate) fn detach(&self, disk: &GuestDisk) {
        let said = self.remove(disk);
        assert!(said.status.success(), "{said:?}\n{}", self.log());
    }

    /// Numbers of the kernel's mappings.
    pub(crate) fn mappings(&self) -> Vec<String> {
        names(&self.path("sys/bus/rbd/devices"))
    }

    /// Files that the script keeps for disks.
    pub(crate) fn records(&self) -> Vec<String> {
        let all = names(&self.path("run/mapped")).into_iter();
        all.filter(|name| !name.starts_with('.')).collect()
    }

    pub(crate) fn calls(&self) -> String {
        read(&self.path("calls"))
    }

    pub(crate) fn log(&self) -> String {
        read(&self.path("log"))
    }
}

fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let names = entries.map(|entry| entry.expect("an entry").file_name());
    let mut names: Vec<String> = names.map(|it| it.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn write(file: &Path, text: &str) {
    fs::create_dir_all(file.parent().expect("a folder")).expect("a folder");
    fs::write(file, text).expect("a file");
}

fn read(file: &Path) -> String {
    fs::read_to_string(file)
        .unwrap_or_default()
        .trim_end()
        .into()
}
