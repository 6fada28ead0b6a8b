// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The project's commands: `cargo xtask --help`.
mod arm64;
mod artifacts;
mod bench;
mod build;
mod cache;
mod check;
mod demo;
mod host;
mod install;
mod kernel;
mod kernel_abi_check;
mod ktap;
mod lanes;
mod low_priority;
mod machine;
mod package;
mod payload;
mod peer_machine;
mod root;
mod run;
mod steps;
mod stolen;
mod tally;
mod time_out;
mod vm;

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Builds, tests and demonstrates xen-blkback-rs.
///
/// The first run makes a Debian build root and the test machines from packages (about 3 minutes); they are kept in
/// $XEN_BLKBACK_RS_CACHE (default: ~/.cache/xen-blkback-rs) and reused. To start anew, remove the folder.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct XtaskCli {
    /// Build for this stock kernel and test with it: 7.3, 7.2, or a version of one such as 7.3.4. The default is the
    /// newest one in the archive that the module is known to work with.
    #[arg(
        long,
        global = true,
        env = "XEN_BLKBACK_RS_KERNEL",
        value_name = "VERSION",
        default_value = "",
        hide_default_value = true
    )]
    kernel: String,
    #[command(subcommand)]
    command: XtaskCommand,
}

#[derive(Debug, Subcommand)]
enum XtaskCommand {
    /// Show the driver at work in a Xen machine.
    ///
    /// Boots Xen and a dom0 in QEMU, starts a guest, and reports the events at its disks. It needs only root on the
    /// host, and takes a few minutes the first time.
    Demo {
        /// Story to show
        #[arg(long, value_enum, default_value = "disks")]
        story: demo::Story,
    },
    /// Run the tests; the last line has the sums.
    ///
    /// Without --lane: all but debug and nightly. The logs of the machine are in target/vm/e2e.
    Test {
        /// Run only this lane; may be given more than once.
        #[arg(long = "lane", value_name = "NAME")]
        lanes: Vec<lanes::Lane>,
        /// In the lanes e2e and debug, run only the tests whose name matches this pattern; in nightly, run only this
        /// part: fuzz, fuzz-tap, deaths, packages, and others.
        #[arg(long, default_value = lanes::ALL, value_name = "PATTERN")]
        only: String,
        /// Seed of the random numbers in the machines, to repeat a run that reported it; the default is a new one each
        /// time.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Check the sources without running them.
    ///
    /// Formatting, lints of the workspace and of the module, licences, dependency direction, places of unsafe code, and
    /// that the module cannot panic or overflow the stack. Equivalent to `cargo xtask test --lane check`.
    Check {
        /// Run only the checks that need neither root nor a Debian tree: formatting and lints by the host's tools,
        /// licence headers, unsafe code, directions, circles, subjects of commits. They take under a minute once
        /// clippy has seen the workspace.
        #[arg(long)]
        sources: bool,
        /// Check only the subject of the commit message in this file: `area: verb the thing`. The hook
        /// ci/hooks/commit-msg does it for each commit.
        #[arg(long, value_name = "FILE", conflicts_with = "sources")]
        message: Option<PathBuf>,
        /// Lower the counts in ci/prose.allow to the sentences that are left.
        #[arg(long, conflicts_with_all = ["sources", "message"])]
        lower_prose: bool,
        /// Lower the counts in ci/names.allow to the types that still share their name.
        #[arg(long, conflicts_with_all = ["sources", "message", "lower_prose"])]
        lower_names: bool,
        /// Run only the checks of the files' texts, which compile nothing: sentences, pages, names, directions and
        /// others.
        #[arg(long, conflicts_with_all = ["sources", "message", "lower_prose", "lower_names"])]
        texts: bool,
        /// Write the parts of docs/reference that are made from the source.
        #[arg(long, conflicts_with_all = ["sources", "message", "lower_prose", "lower_names", "texts"])]
        write_reference: bool,
    },
    /// Build the kernel module and the programs; the last line is the path of the .ko.
    ///
    /// The module is compiled in the build root, against the stock Debian kernel's own Rust tree, and its objects stay
    /// in the cache: the checkout stays clean. A module that could panic is refused. The programs are static, so that
    /// they run in dom0 whatever libc the host has.
    Build {
        /// Also copy the module and the programs into this folder.
        #[arg(long, value_name = "DIR")]
        release_dir: Option<PathBuf>,
        /// Build only the module, from the Kbuild in this folder instead of the checkout's.
        #[arg(long, value_name = "DIR", conflicts_with = "release_dir")]
        source: Option<PathBuf>,
    },
    /// Install the files of a package: the module, the programs, the module loader's settings.
    ///
    /// With these settings the module loader loads this driver in place of the C driver xen-blkback. Run `depmod`
    /// afterwards if DIR is the root of the running system.
    Install {
        /// The folder that stands for `/`.
        #[arg(long, value_name = "DIR")]
        destdir: PathBuf,
    },
    /// Make Debian packages: the module for one kernel, and the programs.
    ///
    /// Installing them changes nothing for the guests: `xen-blkback-rs enable` on the dom0 does. The
    /// last lines are the packages' paths.
    Package {
        /// The folder for the packages.
        #[arg(long, value_name = "DIR", default_value = "target/packages")]
        out: PathBuf,
    },
    /// Make a signed repository for apt of the packages for all supported kernels.
    ///
    /// The folder can be offered by a web server as it is. Packages that are there already stay, so that hosts can
    /// return to them. xen-blkback-rs.asc in it is the public key, and xen-blkback-rs.sources the entry for a host's
    /// /etc/apt/sources.list.d.
    Repository {
        /// The folder of the repository.
        #[arg(long, value_name = "DIR", default_value = "target/repository")]
        out: PathBuf,
        /// Key of gpg that signs: its fingerprint or its owner's address.
        #[arg(long, value_name = "KEY")]
        key: String,
        /// Address at which hosts will find the folder; the default is the folder itself.
        #[arg(long, value_name = "URL")]
        url: Option<String>,
    },
    /// Boot a dom0 with the files of a package, and get a shell in it or run one command.
    ///
    /// `cargo xtask vm -- 'xl info; lsmod'` prints the command's output and exits with its exit code; the consoles are
    /// in target/vm/vm/console.log. Without CMD you get a shell; leave it with `exit`, or at any time with Ctrl-A x. In
    /// dom0, /t holds the test programs and /t/guest a kernel and an initramfs for guests. Changes in there are not
    /// kept.
    Vm(vm::VmArgs),
    /// Measure the driver against the C driver, qdisk and loop, in one boot.
    ///
    /// Time in the machine is counted in executed instructions, so the figures repeat on any host. The results go to
    /// target/bench: results.json, chart.svg, table.txt. A run whose control (this driver against itself) differs by
    /// more than 5 % fails.
    Bench(bench::BenchArgs),
}

fn run(task: XtaskCommand) -> anyhow::Result<ExitCode> {
    match task {
        XtaskCommand::Demo { story } => demo::run(story),
        XtaskCommand::Test { lanes, only, seed } => judged(&lanes::run(&lanes, &only, seed)),
        XtaskCommand::Check {
            message: Some(file),
            ..
        } => check::subjects::message(&file).map(|()| ExitCode::SUCCESS),
        XtaskCommand::Check {
            lower_prose: true, ..
        } => {
            println!("{}", check::prose::lower()?.display());
            Ok(ExitCode::SUCCESS)
        }
        XtaskCommand::Check {
            lower_names: true, ..
        } => {
            for list in check::names::lower()? {
                println!("{}", list.display());
            }
            Ok(ExitCode::SUCCESS)
        }
        XtaskCommand::Check {
            write_reference: true,
            ..
        } => {
            for page in check::reference::write()? {
                println!("{}", page.display());
            }
            Ok(ExitCode::SUCCESS)
        }
        XtaskCommand::Check { texts: true, .. } => {
            let mut tally = tally::TestTally::default();
            check::texts(&mut tally)?;
            judged(&tally)
        }
        XtaskCommand::Check { sources: true, .. } => {
            let mut tally = tally::TestTally::default();
            check::sources(&mut tally)?;
            judged(&tally)
        }
        XtaskCommand::Check { .. } => judged(&lanes::run(&[lanes::Lane::Check], lanes::ALL, None)),
        XtaskCommand::Build {
            source: Some(source),
            ..
        } => {
            let module = build::module_of(&source.canonicalize()?)?;
            check::panics::check(&module)?;
            check::frames::check(&module)?;
            println!("{}", module.display());
            Ok(ExitCode::SUCCESS)
        }
        XtaskCommand::Build { release_dir, .. } => {
            let built = build::all()?;
            check::panics::check(&built.module)?;
            check::frames::check(&built.module)?;
            if let Some(dir) = release_dir {
                build::copy_to(&built, &dir)?;
            }
            println!("{}", built.module.display());
            Ok(ExitCode::SUCCESS)
        }
        XtaskCommand::Install { destdir } => {
            let built = build::all()?;
            install::to(&built.module, Some(&built.programs), &destdir)?;
            Ok(ExitCode::SUCCESS)
        }
        XtaskCommand::Package { out } => {
            for package in package::all(&out)? {
                println!("{}", package.display());
            }
            Ok(ExitCode::SUCCESS)
        }
        XtaskCommand::Repository { out, key, url } => {
            let key = package::repository::SigningKey {
                name: &key,
                home: None,
            };
            package::repository::make(&out, &key, url.as_deref())?;
            println!("{}", out.display());
            Ok(ExitCode::SUCCESS)
        }
        XtaskCommand::Vm(args) => vm::vm(&args),
        XtaskCommand::Bench(args) => Ok(exit(bench::run(&args)?)),
    }
}

/// Shows the times and the sums of tests.
fn judged(tally: &tally::TestTally) -> anyhow::Result<ExitCode> {
    let shown = steps::finish();
    let good = tally.finish();
    shown?;
    Ok(exit(good))
}

fn exit(good: bool) -> ExitCode {
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn main() -> ExitCode {
    let cli = XtaskCli::parse();
    let ready = time_out::show_times().and_then(|()| kernel::request(&cli.kernel));
    match ready.and_then(|()| run(cli.command)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            let lacks = error.chain().any(|cause| cause.is::<host::HostLacks>());
            ExitCode::from(if lacks { 3 } else { 1 })
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        super::XtaskCli::command().debug_assert();
    }
}
