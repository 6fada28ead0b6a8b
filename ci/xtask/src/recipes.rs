// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The artefacts: the build root, the kernel tree, and the disks and initramfs of the machines.

use crate::cache::Artefact;
use crate::kernel::Kernel;
use crate::root::Root;
use crate::{gates, host, kernel, run};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const BUILD_PACKAGES: &str = include_str!("../../recipes/build-root.packages");
const PACKAGE_PACKAGES: &str = include_str!("../../recipes/package-root.packages");
const DKMS_PACKAGES: &str = include_str!("../../recipes/dkms-root.packages");
const DOM0_PACKAGES: &str = include_str!("../../recipes/dom0.packages");
const KERNEL_HOOK: &str = include_str!("../../recipes/kernel-image.hook");
const KERNEL_TREE: &str = include_str!("../../recipes/kernel-tree.sh");
const CHECKED_KERNEL: &str = include_str!("../../recipes/kernel-checked.sh");
const CHECKED_CONFIG: &str = include_str!("../../recipes/kernel-checked.config");
const INITRAMFS: &str = include_str!("../../recipes/initramfs.sh");
const DOM0_INIT: &str = include_str!("../../recipes/dom0-init.sh");
const DOM0_INITRAMFS_INIT: &str = include_str!("../../recipes/dom0-initramfs-init.sh");
const GUEST_INIT: &str = include_str!("../../recipes/guest-init.sh");

/// The modules that dom0 needs to reach its root file system.
const DOM0_MODULES: &str = "virtio_pci virtio_blk ext4";
/// The modules of a guest: its disk, file systems to put on it, and the devices with which a
/// program can play a frontend itself.
const GUEST_MODULES: &str = "xen-blkfront ext4 xen-evtchn xen-gntdev xen-gntalloc xenfs";
const GUEST_PROGRAMS: &str = "/usr/bin/fio /usr/sbin/bonnie++ /usr/sbin/mkfs.ext4 /usr/sbin/e2fsck";
/// Libraries of fio's that are replaced by empty shells, see the recipe.
const GUEST_SHELLS: &str = "librbd.so.1 librados.so.2";

/// The size of dom0's root file system; it is sparse.
const DOM0_SIZE: &str = "1600M";

/// A Debian tree with the compilers, the kernel packages and QEMU.
pub(crate) fn build_root() -> Result<PathBuf> {
    host::prepare()?;
    let release = kernel::release()?;
    Artefact {
        name: "build-root",
        title: "the build root",
        about: "1 min",
        inputs: vec![host::SUITE, BUILD_PACKAGES, KERNEL_HOOK, &release],
    }
    .get(|dir, log| debian(dir, log, BUILD_PACKAGES, Some(&release)))
}

/// The tree that a Rust module is compiled against: `source`, `build` and `kmake`.
pub(crate) fn kernel_tree(build_root: &Path, kernel: Kernel) -> Result<PathBuf> {
    match kernel {
        Kernel::Stock => stock_tree(build_root),
        Kernel::Checked => checked_kernel(build_root),
    }
}

fn stock_tree(build_root: &Path) -> Result<PathBuf> {
    let id = folder_name(build_root)?;
    Artefact {
        name: "kernel-tree",
        title: "the kernel's Rust tree",
        about: "1.5 min",
        inputs: vec![&id, KERNEL_TREE],
    }
    .get(|dir, log| {
        let root = Root::new(build_root).bind(dir, "/mnt/a");
        let release = release(build_root)?;
        let mut script = root.script(KERNEL_TREE);
        run::logged(script.args(["kernel-tree", &release, "/mnt/a"]), log)?;
        gates::check(build_root, dir, &release)
    })
}

/// The kernel with all checks: what [`kernel_tree`] has, and `vmlinuz` and its modules in `installed`.
fn checked_kernel(build_root: &Path) -> Result<PathBuf> {
    let id = folder_name(build_root)?;
    Artefact {
        name: "kernel-checked",
        title: "the kernel with all checks",
        about: "12 min",
        inputs: vec![&id, CHECKED_KERNEL, CHECKED_CONFIG],
    }
    .get(|dir, log| {
        fs::write(dir.join("config"), CHECKED_CONFIG)?;
        let root = Root::new(build_root).bind(dir, "/mnt/a");
        let mut script = root.script(CHECKED_KERNEL);
        script.args(["kernel-checked", &release(build_root)?, "/mnt/a"]);
        run::logged(&mut script, log)
    })
}

/// A Debian tree in which packages are made, judged and tried.
pub(crate) fn package_root() -> Result<PathBuf> {
    host::prepare()?;
    Artefact {
        name: "package-root",
        title: "the tree for packages",
        about: "1 min",
        inputs: vec![host::SUITE, PACKAGE_PACKAGES],
    }
    .get(|dir, log| {
        debian(dir, log, PACKAGE_PACKAGES, None)?;
        Ok(fs::create_dir(dir.join("mnt/a"))?)
    })
}

/// A Debian tree as a host that builds the module by itself, with the stock kernel and its headers.
pub(crate) fn dkms_root() -> Result<PathBuf> {
    host::prepare()?;
    let release = kernel::release()?;
    Artefact {
        name: "dkms-root",
        title: "the host that builds the module",
        about: "1 min",
        inputs: vec![host::SUITE, DKMS_PACKAGES, KERNEL_HOOK, &release],
    }
    .get(|dir, log| debian(dir, log, DKMS_PACKAGES, Some(&release)))
}

/// A Debian tree with Xen's tools, without a kernel and without a module of ours.
fn dom0_root() -> Result<PathBuf> {
    host::prepare()?;
    Artefact {
        name: "dom0-root",
        title: "dom0's root",
        about: "1 min",
        inputs: vec![host::SUITE, DOM0_PACKAGES],
    }
    .get(|dir, log| debian(dir, log, DOM0_PACKAGES, None))
}

/// All that is needed to boot machines.
#[derive(Debug)]
pub(crate) struct Machines {
    /// QEMU and the tools are run in here.
    pub(crate) build_root: PathBuf,
    /// Holds `xen`, `vmlinuz`, `dom0.cpio`, `dom0.img`.
    pub(crate) dom0: PathBuf,
    /// Holds `guest.cpio`, the base of the guests' initramfs.
    pub(crate) guest: PathBuf,
    /// The guests' kernel: the stock one.
    pub(crate) guest_kernel: PathBuf,
    /// Which kernel dom0 has.
    pub(crate) kernel: Kernel,
    /// The folder of dom0's modules, if they are not those of the build root.
    modules: Option<PathBuf>,
}

impl Machines {
    /// The build root, with the modules of dom0's kernel.
    pub(crate) fn root(&self) -> Result<Root> {
        with_modules(&self.build_root, self.modules.as_deref())
    }
}

/// The build root, with these modules in the place of the stock kernel's: they have the same release.
fn with_modules(build_root: &Path, modules: Option<&Path>) -> Result<Root> {
    let root = Root::new(build_root);
    Ok(match modules {
        Some(modules) => root.bind_read_only(modules, &modules_folder(build_root)?),
        None => root,
    })
}

fn modules_folder(build_root: &Path) -> Result<String> {
    Ok(format!("/usr/lib/modules/{}", release(build_root)?))
}

/// Builds what is missing of the machines, and the kernel tree, for who boots also builds: dom0's
/// tree is made while the compilers are busy with the kernel's.
pub(crate) fn machines(kernel: Kernel) -> Result<Machines> {
    let stock = stock_machines()?;
    match kernel {
        Kernel::Stock => Ok(stock),
        Kernel::Checked => checked_machines(stock),
    }
}

/// The machines with another kernel in dom0.
fn checked_machines(stock: Machines) -> Result<Machines> {
    let made = checked_kernel(&stock.build_root)?;
    let dom0_root = dom0_root()?;
    let modules = made
        .join("installed/lib/modules")
        .join(release(&stock.build_root)?);
    let inputs = [folder_name(&made)?, folder_name(&dom0_root)?];
    let kernel = Made {
        image: Some(made.join("vmlinuz")),
        modules: Some(modules),
    };
    let dom0 = Artefact {
        name: "dom0-image-checked",
        title: "dom0's disk for the kernel with all checks",
        about: "20 s",
        inputs: [DOM0_INPUTS, &[&inputs[0], &inputs[1]]].concat(),
    }
    .get(|dir, log| dom0_image(dir, log, &stock.build_root, &dom0_root, &kernel))?;
    Ok(Machines {
        dom0,
        kernel: Kernel::Checked,
        modules: kernel.modules,
        ..stock
    })
}

fn stock_machines() -> Result<Machines> {
    let (build_root, dom0_root) = std::thread::scope(|scope| {
        let other = scope.spawn(dom0_root);
        let build_root = build_root().and_then(|root| stock_tree(&root).map(|_| root));
        (build_root, other.join())
    });
    let build_root = build_root?;
    let dom0_root = dom0_root.map_err(|_| anyhow::anyhow!("building dom0's root panicked"))??;
    let ids = (folder_name(&build_root)?, folder_name(&dom0_root)?);
    let dom0 = Artefact {
        name: "dom0-image",
        title: "dom0's disk",
        about: "20 s",
        inputs: [&[ids.0.as_str(), &ids.1], DOM0_INPUTS].concat(),
    }
    .get(|dir, log| dom0_image(dir, log, &build_root, &dom0_root, &Made::default()))?;
    let guest = Artefact {
        name: "guest-initramfs",
        title: "the guests' initramfs",
        about: "3 s",
        inputs: vec![
            &ids.0,
            &ids.1,
            GUEST_INIT,
            INITRAMFS,
            GUEST_MODULES,
            GUEST_PROGRAMS,
            GUEST_SHELLS,
        ],
    }
    .get(|dir, log| {
        let init = Initramfs {
            init: GUEST_INIT,
            modules: GUEST_MODULES,
            programs: GUEST_PROGRAMS,
            shells: GUEST_SHELLS,
        };
        let root = Root::new(&build_root);
        initramfs(dir, "guest.cpio", log, root, &dom0_root, init)
    })?;
    Ok(Machines {
        build_root,
        guest_kernel: dom0.join("vmlinuz"),
        dom0,
        guest,
        kernel: Kernel::Stock,
        modules: None,
    })
}

/// The release of the stock kernel in the build root.
pub(crate) fn release(build_root: &Path) -> Result<String> {
    Ok(fs::read_to_string(build_root.join("kernel-release"))?
        .trim()
        .to_string())
}

fn folder_name(path: &Path) -> Result<String> {
    Ok(path
        .file_name()
        .context("an artefact has a name")?
        .to_string_lossy()
        .into_owned())
}

/// Makes a Debian tree of the target suite in `dir`, with the stock kernel of this release if there
/// is one.
fn debian(dir: &Path, log: &Path, packages: &str, release: Option<&str>) -> Result<()> {
    let sources = dir.with_extension("list");
    fs::write(&sources, host::sources()?)?;
    let mut packages: Vec<String> = packages
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(str::split_whitespace)
        .map(str::to_string)
        .collect();
    packages.extend(release.map(|release| format!("linux-headers-{release}")));
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=minbase", "--aptopt=Acquire::Languages \"none\""]);
    command.arg(format!("--include={}", packages.join(",")));
    if release.is_some() {
        let hook = dir.with_extension("hook");
        fs::write(&hook, KERNEL_HOOK)?;
        command.arg(format!("--customize-hook=sh {} \"$1\"", hook.display()));
    }
    command.arg(host::SUITE).arg(dir).arg(&sources);
    run::logged(command.stdin(std::process::Stdio::null()), log)
}

/// What dom0's disk is made of beside programs.
const DOM0_INPUTS: &[&str] = &[
    DOM0_INIT,
    DOM0_INITRAMFS_INIT,
    INITRAMFS,
    DOM0_MODULES,
    DOM0_SIZE,
];

/// A kernel that was made here; what there is not is of the stock kernel.
#[derive(Default)]
struct Made {
    image: Option<PathBuf>,
    modules: Option<PathBuf>,
}

fn dom0_image(
    dir: &Path,
    log: &Path,
    build_root: &Path,
    dom0_root: &Path,
    kernel: &Made,
) -> Result<()> {
    let release = release(build_root)?;
    let tree = dir.join("tree");
    let stock = build_root.join(format!("usr/lib/modules/{release}"));
    run::logged(
        Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(dom0_root)
            .arg(&tree),
        log,
    )?;
    fs::create_dir_all(tree.join("usr/lib/modules"))?;
    run::logged(
        Command::new("cp")
            .arg("-a")
            .arg(kernel.modules.as_deref().unwrap_or(&stock))
            .arg(tree.join("usr/lib/modules/")),
        log,
    )?;
    fs::write(tree.join("etc/fstab"), "")?;
    let init = tree.join("usr/sbin/init");
    // A package's init is a link to a program elsewhere: replace the link, not the program.
    if init.symlink_metadata().is_ok() {
        fs::remove_file(&init)?;
    }
    fs::write(&init, DOM0_INIT)?;
    run::shown(Command::new("chmod").arg("+x").arg(&init))?;

    if let Some(image) = &kernel.image {
        fs::copy(image, dir.join("vmlinuz"))?;
    }
    let root = Root::new(build_root).bind(dir, "/mnt/a");
    let script = format!(
        "gunzip -c /mnt/a/tree/boot/xen-4.20-amd64.gz >/mnt/a/xen
         [ -e /mnt/a/vmlinuz ] ||
             cp $(ls /boot/vmlinuz-{release} /usr/lib/modules/{release}/vmlinuz 2>/dev/null | head -n1) /mnt/a/vmlinuz
         rm -f /mnt/a/tree/usr/lib/modules/{release}/vmlinuz
         truncate -s {DOM0_SIZE} /mnt/a/dom0.img
         mkfs.ext4 -q -E lazy_itable_init=0 -d /mnt/a/tree /mnt/a/dom0.img"
    );
    run::logged(&mut root.script(&script), log)?;
    run::remove_tree(&tree)?;
    let init = Initramfs {
        init: DOM0_INITRAMFS_INIT,
        modules: DOM0_MODULES,
        programs: "",
        shells: "",
    };
    let root = with_modules(build_root, kernel.modules.as_deref())?;
    initramfs(dir, "dom0.cpio", log, root, dom0_root, init)
}

/// What an initramfs holds beside busybox.
struct Initramfs {
    init: &'static str,
    modules: &'static str,
    programs: &'static str,
    shells: &'static str,
}

/// Packs an initramfs named `out`.
fn initramfs(
    dir: &Path,
    out: &str,
    log: &Path,
    root: Root,
    dom0_root: &Path,
    what: Initramfs,
) -> Result<()> {
    fs::write(dir.join("init"), what.init)?;
    let root = root.bind(dir, "/mnt/a").bind_read_only(dom0_root, "/mnt/b");
    let mut command = root.script(INITRAMFS);
    command.args([
        "initramfs",
        "/mnt/b",
        &format!("/mnt/a/{out}"),
        "/mnt/a/init",
    ]);
    command.args([what.modules, what.programs, what.shells]);
    run::logged(&mut command, log)?;
    Ok(fs::remove_file(dir.join("init"))?)
}
