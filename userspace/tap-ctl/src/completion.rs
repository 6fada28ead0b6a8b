// SPDX-License-Identifier: MIT OR Apache-2.0
//! Completion of guests and their disks in shells, which the description of the command line does not have.
//!
//! The scripts call `tap-ctl complete`, which prints the words that may follow, and nothing if blktapctrl does not answer
//! at once.

use crate::cli::Cli;
use crate::disks;
use crate::host::xenstore::GuestNames;
use crate::host::Host;
use clap::CommandFactory;
use control::supervisor::{Filter, Reply, Request};
use control::Channel;
use manual::Generated;
use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

/// How long a user who presses a key waits.
const PATIENCE: Duration = Duration::from_secs(1);

const BASH: &str = r#"
# Guests and the disks that they have on this host.
_tap__ctl_disks() {
    local cur="${COMP_WORDS[COMP_CWORD]}" verb="" word words i
    local -a before=()
    _tap__ctl "$@"
    [[ "$cur" == -* ]] && return
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        if [[ -z "$verb" ]]; then
            [[ " VERBS " == *" $word "* ]] && verb="$word"
        elif [[ "$word" != -* ]]; then
            before+=("$word")
        fi
    done
    [[ -z "$verb" ]] && return
    for i in "${!COMPREPLY[@]}"; do
        [[ "${COMPREPLY[i]}" == [\[\<]* ]] && unset "COMPREPLY[i]"
    done
    words=$(tap-ctl complete "${before[@]}" 2>/dev/null)
    [[ -n "$words" ]] && COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -F _tap__ctl_disks -o bashdefault -o default tap-ctl
"#;

const ZSH: &str = r#"
# Guests and the disks that they have on this host.
_tap_ctl_guests() { compadd -- ${(f)"$(tap-ctl complete 2>/dev/null)"} }
_tap_ctl_vdevs() { compadd -- ${(f)"$(tap-ctl complete ${words[CURRENT-1]} 2>/dev/null)"} }
"#;

const FISH: &str = r#"
# Guests and the disks that they have on this host.
complete -c tap-ctl -n "__fish_seen_subcommand_from VERBS" -f -a "(tap-ctl complete (commandline -opc)[3..-1] 2>/dev/null)"
"#;

/// Returns the verbs that take a guest.
fn verbs() -> String {
    let command = Cli::command();
    let takes_guest = |verb: &&clap::Command| {
        verb.get_positionals().any(|word| {
            let names = word.get_value_names().unwrap_or_default();
            names.iter().any(|name| name.starts_with("GUEST"))
        })
    };
    let verbs = command.get_subcommands().filter(takes_guest);
    let verbs: Vec<&str> = verbs.map(clap::Command::get_name).collect();
    verbs.join(" ")
}

/// Returns the script of a shell, or the manual page.
pub(crate) fn script(what: Generated, see_also: &str) -> io::Result<String> {
    let mut bytes = Vec::new();
    manual::write(Cli::command(), what, see_also, &mut bytes)?;
    let text = String::from_utf8(bytes).map_err(io::Error::other)?;
    Ok(match what {
        Generated::Man => text,
        Generated::Bash => text + &BASH.replace("VERBS", &verbs()),
        Generated::Fish => text + &FISH.replace("VERBS", &verbs()),
        Generated::Zsh => zsh(&text),
    })
}

/// Has the words for guests and disks call the functions. The first line of such a script names the program.
fn zsh(text: &str) -> String {
    let mut script = String::new();
    for (number, line) in text.lines().enumerate() {
        let function = [("'::guest -- ", "guests"), ("'::vdev -- ", "vdevs")]
            .into_iter()
            .find_map(|(begin, of)| line.starts_with(begin).then(|| format!(":_tap_ctl_{of}'")));
        match function {
            Some(function) => script.push_str(&line.replace(":_default'", &function)),
            None => script.push_str(line),
        }
        script.push('\n');
        if number == 0 {
            script.push_str(ZSH);
        }
    }
    script
}

/// Prints the words that may follow those after a verb: guests, or the disks of one.
pub(crate) fn complete(cli: &Cli, before: &[String]) -> io::Result<()> {
    let words: Vec<&String> = before
        .iter()
        .filter(|word| !word.starts_with('-'))
        .collect();
    if words.len() > 1 {
        return Ok(());
    }
    let disks = disks(cli).unwrap_or_default();
    let host = Host::at(&cli.root);
    let names = GuestNames::read(&host, disks.iter().map(|(guest, _)| *guest));
    let guest = words.first().map(|word| word.as_str());
    let lines = following(guest, &disks, &names).into_iter();
    crate::say(&lines.map(|word| word + "\n").collect::<String>())
}

/// Returns the guest and the number there of each disk; nothing if blktapctrl does not answer at once.
fn disks(cli: &Cli) -> Option<Vec<(u32, u32)>> {
    let mut channel = Channel::connect(&cli.socket).ok()?;
    channel.set_timeout(Some(PATIENCE)).ok()?;
    let reply = channel.ask(Request::List(Filter::default()), &[]);
    let Ok(Reply::Disks { disks }) = reply else {
        return None;
    };
    let parts = disks.iter().map(|row| disks::parts(row.vbd.as_deref()?));
    Some(parts.flatten().collect())
}

/// A shell parts words at white space, so a guest whose name has some is shown by its number.
fn following(guest: Option<&str>, disks: &[(u32, u32)], names: &GuestNames) -> BTreeSet<String> {
    let word = |guest: u32| {
        let name = names.typed(guest);
        match name.contains(char::is_whitespace) {
            true => guest.to_string(),
            false => name,
        }
    };
    let each = disks.iter().map(|(its, device)| (*its, *device));
    match guest {
        None => each.map(|(its, _)| word(its)).collect(),
        Some(guest) => each
            .filter(|(its, _)| word(*its) == guest || its.to_string() == guest)
            .map(|(_, device)| control::vdev(device))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::{following, script, verbs};
    use crate::cli::Cli;
    use crate::host::xenstore::GuestNames;
    use clap::CommandFactory;
    use manual::Generated;
    use std::process::Command;

    /// Completes a line by the script in a bash whose `tap-ctl` knows a guest.
    fn completed(line: &str) -> String {
        let script = script(Generated::Bash, "").expect("a script");
        let program = "tap-ctl() { case \"$#\" in 1) echo web db ;; 2) echo xvda xvdb ;; esac; }\n";
        let ask = "COMP_WORDS=($LINE)
[[ \"$LINE\" == *' ' ]] && COMP_WORDS+=('')
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_tap__ctl_disks tap-ctl \"${COMP_WORDS[COMP_CWORD]}\" \"${COMP_WORDS[COMP_CWORD-1]}\"
echo ${COMPREPLY[*]}";
        let output = Command::new("bash")
            .args(["--norc", "-c", &(script + program + ask)])
            .env("LINE", line)
            .output()
            .expect("bash");
        let text = String::from_utf8_lossy(&output.stdout);
        text.trim().to_owned()
    }

    #[test]
    fn bash_completes_verbs_options_guests_and_disks() {
        assert_eq!(completed("tap-ctl unpau"), "unpause");
        let options = completed("tap-ctl pause --");
        assert!(options.contains("--timeout"), "below the verb: {options}");
        let group = completed("tap-ctl group set --");
        assert!(group.contains("--bps"), "below two verbs: {group}");
        for (line, words) in [
            ("tap-ctl pause ", "web db"),
            ("tap-ctl pause w", "web"),
            ("tap-ctl --json status web ", "xvda xvdb"),
            ("tap-ctl snapshot web xvd", "xvda xvdb"),
        ] {
            assert_eq!(completed(line), words, "{line}");
        }
    }

    /// The verbs and long options of a command, and of its verbs, that are hidden or not.
    fn words(command: &clap::Command, is_hidden: bool) -> Vec<String> {
        let options = command.get_arguments();
        let options = options.filter(|option| option.is_hide_set() == is_hidden);
        let options = options.filter_map(|option| Some(format!("--{}", option.get_long()?)));
        let mut words: Vec<String> = options.collect();
        for verb in command.get_subcommands() {
            if verb.is_hide_set() == is_hidden {
                words.push(verb.get_name().to_owned());
            }
            words.extend(self::words(verb, is_hidden));
        }
        words
    }

    #[test]
    fn no_shell_offers_what_is_hidden() {
        let command = Cli::command();
        let hidden = words(&command, true);
        for word in ["--root", "--xl", "--tapimg", "freeze-guard", "complete"] {
            assert!(hidden.iter().any(|its| its == word), "{word}: {hidden:?}");
        }
        let shown = words(&command, false);
        for what in [Generated::Bash, Generated::Zsh, Generated::Fish] {
            let mut text = Vec::new();
            manual::write(command.clone(), what, "", &mut text).expect("a script");
            let text = String::from_utf8(text).expect("text");
            // Each as the script of this shell writes what it offers.
            let offers = |word: &str| match (what, word.strip_prefix("--")) {
                (Generated::Fish, Some(option)) => text.contains(&format!(" -l {option} ")),
                (Generated::Fish, None) => text.contains(&format!(" -a \"{word}\" ")),
                (Generated::Zsh, Some(_)) => ["[", "=[", "=-["]
                    .iter()
                    .any(|end| text.contains(&format!("{word}{end}"))),
                (Generated::Zsh, None) => text.contains(&format!("\n'{word}:")),
                (_, Some(_)) => text.split([' ', '"']).any(|its| its == word),
                (_, None) => text.contains(&format!("__{}\"\n", word.replace('-', "__subcmd__"))),
            };
            for word in &shown {
                let is_plain = words(&command, true).iter().all(|its| its != word);
                assert!(offers(word) || !is_plain, "{what:?} lacks {word}");
            }
            for word in &hidden {
                assert!(!offers(word), "{what:?} offers {word}");
            }
        }
    }

    #[test]
    fn zsh_and_fish_ask_for_guests_and_disks() {
        let zsh = script(Generated::Zsh, "").expect("a script");
        assert!(zsh.starts_with("#compdef tap-ctl\n"), "{zsh}");
        for words in ["xl list:_tap_ctl_guests'", "tap disk:_tap_ctl_vdevs'"] {
            assert!(zsh.contains(words), "{words}");
        }
        let fish = script(Generated::Fish, "").expect("a script");
        assert!(fish.contains("(tap-ctl complete (commandline"), "{fish}");
    }

    #[test]
    fn words_are_guests_and_then_their_disks() {
        let names = GuestNames::from([(3, "web"), (4, "a b")]);
        let disks = [(3, 51712), (3, 51728), (4, 51712)];
        let words = |guest| Vec::from_iter(following(guest, &disks, &names));
        assert_eq!(words(None), ["4", "web"]);
        assert_eq!(words(Some("web")), ["xvda", "xvdb"]);
        assert_eq!(words(Some("4")), ["xvda"]);
        assert!(words(Some("mail")).is_empty());
        let verbs = verbs();
        for verb in ["pause", "snapshot", "mirror", "status", "list", "handoff"] {
            assert!(verbs.split(' ').any(|its| its == verb), "{verb}: {verbs}");
        }
        assert!(!verbs.contains("create"), "{verbs}");
    }
}
