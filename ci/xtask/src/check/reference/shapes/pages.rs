// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Pages with JSON, and the types that commands print.

/// Types that a command prints: the commands, and the type with the file that defines it. Without commands the page has
/// the table only.
pub(super) type PrintedType = (&'static str, &'static str, &'static str);

/// Blocks of pages. A type that several blocks need is on the page of the first one.
pub(super) const PAGES: &[(&str, &str, &[PrintedType])] = &[
    (
        "events",
        "events.md",
        &[(
            "`tap-ctl events`",
            "userspace/control/src/supervisor/event.rs",
            "Event",
        )],
    ),
    (
        "disks",
        "json-disks.md",
        &[
            (
                "`tap-ctl list`",
                "userspace/tap-ctl/src/list.rs",
                "ListedDisks",
            ),
            (
                "`tap-ctl report`",
                "userspace/tap-ctl/src/report.rs",
                "HostReport",
            ),
            (
                "`tap-ctl lease show`, of an image of Ceph,",
                "userspace/tap-ctl/src/lease/rbd.rs",
                "CephView",
            ),
            (
                "`tap-ctl lease break`, of an image of Ceph,",
                "userspace/tap-ctl/src/lease/rbd.rs",
                "BrokenCephLock",
            ),
        ],
    ),
    (
        "counters",
        "json-counters.md",
        &[("", "userspace/control/src/stats.rs", "Stats")],
    ),
    (
        "status",
        "json-status.md",
        &[
            (
                "`tap-ctl status`",
                "userspace/tap-ctl/src/status/mod.rs",
                "Report",
            ),
            (
                "`tap-ctl top`",
                "userspace/tap-ctl/src/top/plain.rs",
                "Shown",
            ),
        ],
    ),
    (
        "answers",
        "json-answers.md",
        &[
            (
                "Each other verb of `tap-ctl`",
                "userspace/control/src/supervisor.rs",
                "Reply",
            ),
            (
                "`tap-ctl handoff --all`",
                "userspace/tap-ctl/src/handoff.rs",
                "Summary",
            ),
            (
                "`tap-ctl lease show`",
                "userspace/lease/src/lib.rs",
                "LeaseView",
            ),
            (
                "`tap-ctl lease break`",
                "userspace/tap-ctl/src/lease.rs",
                "BrokenLease",
            ),
        ],
    ),
    (
        "tools",
        "json-tools.md",
        &[
            (
                "`tap-ctl doctor`",
                "userspace/tap-ctl/src/doctor/mod.rs",
                "Report",
            ),
            (
                "`xen-blkback-rs takeover`",
                "userspace/takeover/src/rebind.rs",
                "SwapOutcome",
            ),
            (
                "`xen-blkback-rs exchange`",
                "userspace/takeover/src/module_exchange.rs",
                "ExchangeResult",
            ),
        ],
    ),
    (
        "tapimg",
        "json-tapimg.md",
        &[
            ("`tapimg info`", "userspace/tapimg/src/info.rs", "Facts"),
            (
                "`tapimg create`",
                "userspace/tapimg/src/made.rs",
                "MadeImage",
            ),
            (
                "`tapimg convert`",
                "userspace/tapimg/src/made.rs",
                "ConvertResult",
            ),
            (
                "`tapimg check`",
                "userspace/tapimg/src/check.rs",
                "Findings",
            ),
            (
                "`tapimg compare`",
                "userspace/tapimg/src/compare.rs",
                "DiskDifference",
            ),
            ("`tapimg map`", "userspace/tapimg/src/map.rs", "DiskExtents"),
            (
                "`tapimg commit`",
                "userspace/tapimg/src/commit.rs",
                "CommitResult",
            ),
            (
                "`tapimg rebase`",
                "userspace/tapimg/src/rebase.rs",
                "RebaseResult",
            ),
            (
                "`tapimg resize`",
                "userspace/tapimg/src/resize.rs",
                "ResizeResult",
            ),
            (
                "`tapimg snapshot`",
                "userspace/tapimg/src/snapshot.rs",
                "SnapshotAnswer",
            ),
            (
                "`tapimg replay`",
                "userspace/tapimg/src/replay.rs",
                "ReplayResult",
            ),
            (
                "`tapimg replay FILE --list`",
                "userspace/tapimg/src/replay.rs",
                "TraceListing",
            ),
            (
                "`tapimg serve`",
                "userspace/tapimg/src/serve/mod.rs",
                "ReadyMessage",
            ),
        ],
    ),
    (
        "backups",
        "json-backup.md",
        &[
            (
                "`tap-ctl backup`",
                "userspace/tap-ctl/src/backup/mod.rs",
                "BackupResult",
            ),
            (
                "`tap-ctl backup list`",
                "userspace/tap-ctl/src/backup/list.rs",
                "BackupList",
            ),
            (
                "`tap-ctl backup verify`",
                "userspace/tap-ctl/src/backup/list.rs",
                "VerifiedBackups",
            ),
            (
                "`tap-ctl backup repair`",
                "userspace/tap-ctl/src/backup/mod.rs",
                "RepairResult",
            ),
            (
                "`tap-ctl restore`",
                "userspace/tap-ctl/src/backup/restore.rs",
                "RestoreResult",
            ),
            (
                "`tap-ctl migrate-out`",
                "userspace/tap-ctl/src/migrate_out/mod.rs",
                "MoveResult",
            ),
        ],
    ),
];
