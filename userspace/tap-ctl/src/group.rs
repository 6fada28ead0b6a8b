// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl group`: limits that several disks share.

use clap::{Args, Subcommand};
use control::supervisor::{Group, GroupChanges, Member, Request};
use control::{GroupName, GroupRate, MILLI};
use std::fmt::Write;

/// Actions on groups.
#[derive(Debug, Subcommand)]
pub(crate) enum GroupVerb {
    /// Make a group, or change what its disks may do together, while their guests work
    Set {
        /// The group
        name: GroupName,
        #[command(flatten)]
        what: Limits,
    },
    /// List the groups
    List,
    /// Say what each disk of a group may do at the moment, and what it does
    Show {
        /// The group
        name: GroupName,
    },
    /// Take away a group that has no disks any more
    Remove {
        /// The group
        name: GroupName,
    },
}

/// New limits, at least one. Other limits stay.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Limits {
    /// Let its guests read and write no more bytes than this in a second, such as 100M; 0 for as many as there are
    #[arg(long, visible_alias = "bytes-per-second", value_name = "BYTES", value_parser = control::typed_rate)]
    bps: Option<u64>,
    /// Execute no more of their requests than this in a second, such as 500 or 20k; 0 for as many as there are
    #[arg(
        long,
        visible_alias = "requests-per-second",
        value_name = "NUMBER",
        value_parser = control::typed_requests
    )]
    iops: Option<u32>,
    /// Seconds of its limits that each disk may use at once after a rest
    #[arg(long, value_name = "SECONDS")]
    burst: Option<u32>,
}

/// The question.
pub(crate) fn request(verb: &GroupVerb) -> Request {
    match verb {
        GroupVerb::Set { name, what } => Request::SetGroup {
            name: name.clone(),
            changes: GroupChanges {
                bytes: what.bps,
                requests: what.iops,
                burst_s: what.burst,
            },
        },
        GroupVerb::List => Request::Groups { name: None },
        GroupVerb::Show { name } => Request::Groups {
            name: Some(name.clone()),
        },
        GroupVerb::Remove { name } => Request::RemoveGroup { name: name.clone() },
    }
}

/// Returns a line for each group, and on request lines for its disks.
pub(crate) fn show(groups: &[Group], with_disks: bool) -> String {
    let mut text = String::new();
    for group in groups {
        let _ = writeln!(
            text,
            "name={} limits={{{}}} disks={} bytes={} requests={}",
            group.name,
            group.limits,
            group.members.len(),
            group.bytes,
            group.requests
        );
        let members = group.members.iter().filter(|_| with_disks);
        members.for_each(|member| text.push_str(&line(member)));
    }
    text
}

fn line(member: &Member) -> String {
    format!(
        "minor={} may={{{}}} does={{bps={} iops={}}} lacks={}\n",
        member.minor,
        member.pace.map_or("nothing".into(), pace),
        member.bytes,
        requests(member.milli_requests),
        if member.lacks { "yes" } else { "no" }
    )
}

fn pace(pace: GroupRate) -> String {
    let bytes = pace.bytes.map(|bytes| format!("bps={bytes}"));
    let requests = pace
        .milli_requests
        .map(|milli| format!("iops={}", requests(milli)));
    let both: Vec<String> = [bytes, requests].into_iter().flatten().collect();
    both.join(" ")
}

fn requests(milli: u64) -> String {
    format!("{}.{}", milli / MILLI, milli % MILLI / 100)
}

#[cfg(test)]
mod tests {
    use super::show;
    use control::supervisor::{Group, Member};
    use control::{GroupRate, Limits};

    #[test]
    fn a_group_is_a_line_and_so_is_each_disk() {
        let member = |minor, pace| Member {
            minor,
            pace,
            bytes: 7,
            milli_requests: 1250,
            lacks: pace.is_some(),
        };
        let pace = GroupRate {
            bytes: Some(5),
            milli_requests: Some(2000),
        };
        let group = Group {
            name: "all.7".parse().expect("a name"),
            limits: Limits {
                bytes: 1 << 20,
                ..Limits::default()
            },
            members: vec![member(3, Some(pace)), member(4, None)],
            bytes: 12,
            requests: 2,
        };
        let first = "name=all.7 limits={bps=1048576 burst=1s} disks=2 bytes=12 requests=2\n";
        assert_eq!(show(std::slice::from_ref(&group), false), first);
        assert_eq!(
            show(&[group], true),
            format!(
                "{first}minor=3 may={{bps=5 iops=2.0}} does={{bps=7 iops=1.2}} lacks=yes\n\
                 minor=4 may={{nothing}} does={{bps=7 iops=1.2}} lacks=no\n"
            )
        );
    }
}
