// SPDX-License-Identifier: MIT OR Apache-2.0
//! The part of a command line that a shell may offer: clap_complete offers hidden verbs and options as well.

use clap::{Arg, ArgGroup, Command};

/// Returns a command without its hidden verbs and options. Visible options must not refer to hidden ones.
pub(crate) fn offered(command: &Command) -> Command {
    let mut shown = Command::new(command.get_name().to_owned())
        .disable_help_subcommand(command.is_disable_help_subcommand_set())
        .disable_version_flag(command.is_disable_version_flag_set())
        .visible_aliases(command.get_visible_aliases().map(str::to_owned))
        .groups(command.get_groups().map(|group| visible(command, group)))
        .args(command.get_arguments().filter(|arg| !arg.is_hide_set()))
        .subcommands(verbs(command).map(offered));
    if let Some(about) = command.get_about() {
        shown = shown.about(about.clone());
    }
    if let Some(version) = command.get_version() {
        shown = shown.version(version.to_owned());
    }
    shown
}

/// Returns the verbs that are not hidden.
pub(crate) fn verbs(command: &Command) -> impl Iterator<Item = &Command> {
    let verbs = command.get_subcommands();
    verbs.filter(|verb| !verb.is_hide_set())
}

/// Returns a group without the hidden options in it.
fn visible(command: &Command, group: &ArgGroup) -> ArgGroup {
    let hidden = |id| {
        let mut args = command.get_arguments();
        args.any(|arg: &Arg| arg.get_id() == id && arg.is_hide_set())
    };
    let mut multiple = group.clone();
    ArgGroup::new(group.get_id().clone())
        .args(group.get_args().filter(|id| !hidden(*id)))
        .required(group.is_required_set())
        .multiple(multiple.is_multiple())
}
