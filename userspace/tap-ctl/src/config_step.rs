// SPDX-License-Identifier: MIT OR Apache-2.0
//! The step after a verb that leaves a disk with another image: the guest's configuration must name that.

use crate::cli::{Cli, Verb};
use crate::disks;
use crate::host::xenstore::GuestNames;
use crate::host::{xl_files, Host};

/// The command, as messages have it.
const COMMAND: &str = "xl config-update GUEST FILE";

/// Returns a message whose command names the guest, and its file if that can be found.
pub(crate) fn filled_in(cli: &Cli, text: String) -> String {
    let vbd = match &cli.verb {
        Verb::Snapshot(asked) => asked
            .disks
            .first()
            .and_then(|(which, _)| which.vbd.as_deref()),
        Verb::Mirror(asked) | Verb::Commit(asked) => asked.which.vbd.as_deref(),
        _ => None,
    };
    let guest = vbd.and_then(disks::parts).map(|(guest, _)| guest);
    let Some(guest) = guest.filter(|_| text.contains(COMMAND)) else {
        return text;
    };
    let host = Host::at(&cli.root);
    let names = GuestNames::read(&host, [guest]);
    let file = names
        .get(guest)
        .and_then(|name| xl_files::of_guest(&host, name));
    let file = file.map_or_else(|| "FILE".into(), |path| path.display().to_string());
    let command = format!("xl config-update {} {file}", names.typed(guest));
    text.replace(COMMAND, &command)
}

#[cfg(test)]
mod tests {
    use super::filled_in;
    use crate::cli::Cli;
    use crate::host::made::Made;
    use crate::host::xenstore;
    use clap::Parser;

    fn shown(made: &Made, words: &[&str]) -> String {
        let root = made.root().display().to_string();
        let all = ["tap-ctl", "--root", &root]
            .into_iter()
            .chain(words.iter().copied());
        let mut cli = Cli::parse_from(all);
        cli.verb.settle().expect("a command");
        filled_in(&cli, "now `xl config-update GUEST FILE`.".into())
    }

    #[test]
    fn the_command_names_the_guest_and_its_file() {
        const MIRROR: [&str; 4] = ["mirror", "--vbd", "backend/vbd/3/51712", "aio:/srv/b"];
        let made = Made::new();
        assert_eq!(shown(&made, &MIRROR), "now `xl config-update 3 FILE`.");
        xenstore::fake::serve(&made, &[(3, "web")]);
        assert_eq!(shown(&made, &MIRROR), "now `xl config-update web FILE`.");
        made.file(
            "/etc/xen/web.cfg",
            "# name = 'old'\nname = \"web\"\nvcpus = 2\n",
        );
        made.file("/etc/xen/other.cfg", "name = 'web2' # 'web'\n");
        let named = "now `xl config-update web /etc/xen/web.cfg`.";
        assert_eq!(shown(&made, &MIRROR), named);
        let snapshot = ["snapshot", "--vbd", "backend/vbd/3/51712", "/srv/b.qcow2"];
        assert_eq!(shown(&made, &snapshot), named);
        // A disk without a guest, and a guest with two files.
        let unnamed = ["mirror", "-m", "0", "aio:/srv/b"];
        assert_eq!(shown(&made, &unnamed), "now `xl config-update GUEST FILE`.");
        made.file("/etc/xen/web.old", "name='web'\n");
        assert_eq!(shown(&made, &MIRROR), "now `xl config-update web FILE`.");
    }
}
