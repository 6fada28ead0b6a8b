// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! End to end tests that run inside a Xen machine.
//!
//! One static binary with several modes: `run` executes the cases in dom0, `agent` executes commands in the guests that
//! the cases start, `history` loads a disk there and judges its reads, `reread` checks later whether the data stays,
//! `crash-kernel` gives a guest another kernel to write a dump, `demo` tells the whole story of one disk to a person,
//! `peer` and `reach` are a second host and the way to it, `cluster` is a cluster of Ceph beside it.

mod agent;
mod backing;
mod boot;
mod cases;
mod cluster;
mod console;
mod crash;
mod demo;
mod driver_domain;
mod guest;
mod history;
mod hotplug;
mod leaks;
mod life;
mod memory;
mod node;
mod peer;
mod process;
mod report;
mod reread;
mod reserved;
mod seed;
mod sh;
mod splat;
mod sys;
mod tap;
mod xs;

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};
use std::path::Path;
use std::process::ExitCode;

/// End to end tests of a Xen block backend.
#[derive(Parser)]
#[command(name = "vmtest", version)]
struct VmCli {
    #[command(subcommand)]
    face: Face,
}

#[derive(Subcommand)]
enum Face {
    /// Run the cases in dom0 and print KTAP to the file named by REPORT (default: standard output).
    Run {
        #[command(flatten)]
        cases: cases::Selection,
        /// The driver that must serve the disks.
        #[arg(long, value_enum, default_value = "rs")]
        driver: TestedDriver,
        /// Seed of the random numbers; a run prints its own, with which it can be repeated.
        #[arg(long)]
        seed: Option<u64>,
        /// List the cases and stop.
        #[arg(long)]
        list: bool,
    },
    /// Tell a story.
    Demo {
        /// Story to tell.
        #[arg(long, value_enum, default_value = "disks")]
        story: demo::DemoStory,
        /// The driver that must serve the disk.
        #[arg(long, value_enum, default_value = "rs")]
        driver: TestedDriver,
    },
    /// On a host with systemd: a part of the life of the packages.
    Life {
        /// Part to run.
        #[arg(value_enum)]
        part: life::BootPart,
    },
    /// In a guest: read and write a disk at random and judge what was read.
    History(history::HistoryArgs),
    /// In a guest: read a disk into memory, and look later whether it is still there.
    Reread(reread::RereadArgs),
    /// In a guest: load the kernel that starts when it has crashed.
    CrashKernel(crash::CrashArgs),
    /// Execute commands from the console; this is what a guest runs as its first process.
    Agent {
        /// The guest has another first process, which has mounted and loaded what there is.
        #[arg(long)]
        in_system: bool,
    },
    /// Be the second of two hosts: execute the commands of the first one.
    Peer,
    /// Be a cluster of Ceph: bring it up, and execute the commands of the Xen host.
    Cluster {
        /// The disk below its storage; what is on it is lost.
        disk: String,
    },
    /// Execute a command on the other host, with this standard input and output.
    Reach {
        /// Its address.
        address: String,
        /// The command.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<std::ffi::OsString>,
    },
}

/// The backend driver under test.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TestedDriver {
    /// The driver of this project.
    Rs,
    /// The C driver of the Linux kernel, as a reference.
    C,
}

impl TestedDriver {
    /// The name for modprobe.
    pub(crate) fn module(self) -> &'static str {
        match self {
            TestedDriver::Rs => "xen-blkback-rs",
            TestedDriver::C => "xen-blkback",
        }
    }

    /// The directory below /sys/module.
    pub(crate) fn sys_module(self) -> &'static str {
        match self {
            TestedDriver::Rs => "xen_blkback_rs",
            TestedDriver::C => "xen_blkback",
        }
    }

    /// Returns whether its module is loaded.
    pub(crate) fn is_loaded(self) -> bool {
        Path::new("/sys/module").join(self.sys_module()).exists()
    }

    /// The name on the xen-backend bus.
    pub(crate) fn bus_name(self) -> &'static str {
        match self {
            TestedDriver::Rs => "xen-blkback-rs",
            TestedDriver::C => "vbd",
        }
    }

    /// The driver that must be out of the way.
    pub(crate) fn other(self) -> TestedDriver {
        match self {
            TestedDriver::Rs => TestedDriver::C,
            TestedDriver::C => TestedDriver::Rs,
        }
    }
}

fn main() -> ExitCode {
    match start() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vmtest: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn start() -> Result<ExitCode> {
    // The guest's init executes this file under the name of `agent`, without any argument.
    let argv0 = std::env::args().next().unwrap_or_default();
    let is_agent = Path::new(&argv0)
        .file_name()
        .is_some_and(|name| name == "agent");
    if is_agent && std::env::args().len() == 1 {
        agent::main()?;
        return Ok(ExitCode::SUCCESS);
    }
    // xl executes it under this name.
    if Path::new(&argv0)
        .file_name()
        .is_some_and(|name| name == hotplug::NAME)
    {
        hotplug::main()?;
        return Ok(ExitCode::SUCCESS);
    }
    match VmCli::parse().face {
        Face::Run {
            cases: selection,
            driver,
            seed,
            list,
        } => {
            if list {
                for case in cases::all() {
                    println!("{:40} {}", case.name, case.about);
                }
                return Ok(ExitCode::SUCCESS);
            }
            seed::begin(seed);
            cases::run(&selection, driver)
        }
        Face::Demo { driver, story } => demo::run(driver, story),
        Face::Life { part } => life::run(part),
        Face::History(args) => history::main(&args).map(|()| ExitCode::SUCCESS),
        Face::Reread(args) => reread::main(&args).map(|()| ExitCode::SUCCESS),
        Face::CrashKernel(args) => crash::load(&args).map(|()| ExitCode::SUCCESS),
        Face::Agent { in_system: false } => agent::main().map(|()| ExitCode::SUCCESS),
        Face::Agent { in_system: true } => agent::in_system().map(|()| ExitCode::SUCCESS),
        Face::Peer => peer::main().map(|()| ExitCode::SUCCESS),
        Face::Cluster { disk } => cluster::main(&disk).map(|()| ExitCode::SUCCESS),
        Face::Reach { address, command } => {
            peer::reach(&address, &command).map(|()| ExitCode::SUCCESS)
        }
    }
}
