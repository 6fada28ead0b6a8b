// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Running a program inside a Debian tree (the build root), because the host's own tools may be old or absent.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The mounts live in a namespace of the call, so nothing outlives it and no later clean-up can reach the host's /dev
/// through the tree. The program dies with this process.
const ENTER: &str = r#"set -e
root=$1; shift
mount --make-rprivate /
if [ "$1" = thrown-away ]; then
	mount -t tmpfs changes "$root/mnt"
	mkdir "$root/mnt/new" "$root/mnt/work" "$root/mnt/tree"
	mount -t overlay tree -o "lowerdir=$root,upperdir=$root/mnt/new,workdir=$root/mnt/work" "$root/mnt/tree"
	root=$root/mnt/tree
fi
shift
for d in proc sys dev; do mount --rbind "/$d" "$root/$d"; done
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
while [ "$1" != -- ]; do
	mount --bind "$1" "$root$2"
	[ "$3" = rw ] || mount -o remount,bind,ro "$root$2"
	shift 3
done
shift
exec setpriv --pdeathsig KILL chroot "$root" "$@""#;

/// A Debian tree, with folders of the host shown inside it.
#[derive(Debug, Clone)]
pub(crate) struct Root {
    dir: PathBuf,
    binds: Vec<(PathBuf, String, &'static str)>,
    /// `kept` or `thrown-away`: fate of changes to the tree.
    changes: &'static str,
}

impl Root {
    /// Returns the tree at `dir`.
    pub(crate) fn new(dir: &Path) -> Self {
        Root {
            dir: dir.into(),
            binds: Vec::new(),
            changes: "kept",
        }
    }

    /// Discards changes to the tree when the program ends.
    pub(crate) fn thrown_away(mut self) -> Self {
        self.changes = "thrown-away";
        self
    }

    /// Shows `host` at `inside`, an existing folder of the tree such as /mnt/a.
    pub(crate) fn bind(mut self, host: &Path, inside: &str) -> Self {
        self.binds.push((host.into(), inside.into(), "rw"));
        self
    }

    /// Shows `host` at `inside` read-only.
    pub(crate) fn bind_read_only(mut self, host: &Path, inside: &str) -> Self {
        self.binds.push((host.into(), inside.into(), "ro"));
        self
    }

    /// Returns a command that runs `program` in the tree. The process keeps its id all the way, so killing the child
    /// kills the program.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("unshare");
        command
            .args(["-m", "sh", "-c", ENTER, "enter"])
            .arg(&self.dir)
            .arg(self.changes);
        for (host, inside, mode) in &self.binds {
            command.arg(host).arg(inside).arg(mode);
        }
        command.arg("--").arg(program);
        // The host's build settings must not reach the tree's compilers.
        command.env_clear();
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("HOME", "/root").env("LC_ALL", "C.UTF-8");
        command.env(
            "TERM",
            std::env::var_os("TERM").unwrap_or_else(|| "dumb".into()),
        );
        command
    }

    /// Returns a command like [`command`](Self::command) for a text given to `sh`.
    pub(crate) fn script(&self, text: &str) -> Command {
        let mut command = self.command("sh");
        command.args(["-euc", text]);
        command
    }
}
