// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The artefacts: the build root, the kernel tree, and the disks and initramfs of the machines.

mod extended;
mod guest_agent;

use crate::cache::Artefact;
use crate::kernel::Dom0Kernel;
use crate::root::Root;
use crate::{host, kernel, kernel_abi_check, run};
use anyhow::{Context, Result};
pub(crate) use extended::{ceph, two_hosts};
pub(crate) use guest_agent::guest_agent;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const BUILD_PACKAGES: &str = include_str!("../../recipes/build-root.packages");
const PACKAGE_PACKAGES: &str = include_str!("../../recipes/package-root.packages");
const DKMS_PACKAGES: &str = include_str!("../../recipes/dkms-root.packages");
const DOM0_PACKAGES: &str = include_str!("../../recipes/dom0.packages");
const KERNEL_HOOK: &str = include_str!("../../recipes/kernel-image.hook");
pub(crate) const KERNEL_TREE: &str = include_str!("../../recipes/kernel-tree.sh");
const CHECKED_KERNEL: &str = include_str!("../../recipes/kernel-checked.sh");
const CHECKED_CONFIG: &str = include_str!("../../recipes/kernel-checked.config");
const INITRAMFS: &str = include_str!("../../recipes/initramfs.sh");
const HOST_PACKAGES: &str = include_str!("../../recipes/host.packages");
const HOST_HOOK: &str = include_str!("../../recipes/host.hook");
const HOST_TEST: &str = include_str!("../../recipes/host-test.sh");
const HOST_SERVICE: &str = include_str!("../../recipes/host-test.service");
const DOM0_INIT: &str = include_str!("../../recipes/dom0-init.sh");
const DOM0_INITRAMFS_INIT: &str = include_str!("../../recipes/dom0-initramfs-init.sh");
const GUEST_INIT: &str = include_str!("../../recipes/guest-init.sh");

/// The modules that dom0 needs to reach its root file system.
const DOM0_MODULES: &str = "virtio_pci virtio_blk ext4";
/// The modules of a guest: its disk, file systems to put on it, and the devices that a program needs to act as a
/// frontend.
const GUEST_MODULES: &str = "xen-blkfront ext4 xen-evtchn xen-gntdev xen-gntalloc xenfs";
const GUEST_PROGRAMS: &str = "/usr/bin/fio /usr/sbin/bonnie++ /usr/sbin/mkfs.ext4 /usr/sbin/e2fsck";
/// Libraries of fio that are replaced by empty ones, see the recipe.
const GUEST_SHELLS: &str = "librbd.so.1 librados.so.2";

/// Takes kernel and modules out of a tree in which packages are only unpacked.
const GUEST_KERNEL: &str = "cd /mnt/a
    release=$(ls tree/usr/lib/modules 2>/dev/null || ls tree/lib/modules)
    [ -d \"tree/usr/lib/modules/$release\" ] || { mkdir -p tree/usr/lib && mv tree/lib/modules tree/usr/lib/; }
    [ -e tree/lib/modules ] || { mkdir -p tree/lib && ln -s ../usr/lib/modules tree/lib/modules; }
    depmod -b tree \"$release\"
    mv \"tree/usr/lib/modules/$release\" modules
    mv \"tree/boot/vmlinuz-$release\" vmlinuz
    echo \"$release\" >release";
/// Size of dom0's root file system; it is sparse.
const DOM0_SIZE: &str = "1600M";
/// Size of the root file system of a host on which packages are installed.
const HOST_SIZE: &str = "2500M";

/// Returns a Debian tree with the compilers, the kernel packages and QEMU.
pub(crate) fn build_root() -> Result<PathBuf> {
    host::prepare()?;
    let release = kernel::release()?;
    Artefact {
        name: "build-root",
        title: "the build root",
        about: "1 min",
        inputs: vec![host::SUITE, BUILD_PACKAGES, KERNEL_HOOK, &release],
    }
    .get(|dir, log| with_kernel(dir, log, BUILD_PACKAGES, &release))
}

/// Returns the tree that a Rust module is compiled against: `source`, `build` and `kmake`.
pub(crate) fn kernel_tree(build_root: &Path, kernel: Dom0Kernel) -> Result<PathBuf> {
    match kernel {
        Dom0Kernel::Stock => stock_tree(build_root),
        Dom0Kernel::Checked => checked_kernel(build_root),
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
        kernel_abi_check::check(build_root, dir, &release)
    })
}

/// Returns the kernel with all checks: the content of [`kernel_tree`], with `vmlinuz` and its modules in `installed`.
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

/// Returns a Debian tree in which packages are made, checked and tested.
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

/// Returns a Debian tree of a host that builds the module for itself, with the stock kernel and its headers.
pub(crate) fn dkms_root() -> Result<PathBuf> {
    host::prepare()?;
    let release = kernel::release()?;
    Artefact {
        name: "dkms-root",
        title: "the host that builds the module",
        about: "1 min",
        inputs: vec![host::SUITE, DKMS_PACKAGES, KERNEL_HOOK, &release],
    }
    .get(|dir, log| with_kernel(dir, log, DKMS_PACKAGES, &release))
}

/// Returns a Debian tree with Xen's tools, without a kernel and without this project's module.
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

/// Returns a Debian tree of a host with systemd, on which apt installs packages.
fn host_root(release: &str) -> Result<PathBuf> {
    host::prepare()?;
    Artefact {
        name: "host-root",
        title: "the root of a host with systemd",
        about: "1 min",
        inputs: vec![host::SUITE, HOST_PACKAGES, HOST_HOOK, release],
    }
    .get(|dir, log| debian(dir, log, HOST_PACKAGES, Some((HOST_HOOK, release))))
}

/// Everything that is needed to boot machines.
#[derive(Debug)]
pub(crate) struct Machines {
    /// QEMU and the tools run in this tree.
    pub(crate) build_root: PathBuf,
    /// Folder with `xen`, `vmlinuz`, `dom0.cpio`, `dom0.img`.
    pub(crate) dom0: PathBuf,
    /// Folder with `guest.cpio`, the base of the guests' initramfs.
    pub(crate) guest: PathBuf,
    /// The guests' kernel: the stock one.
    pub(crate) guest_kernel: PathBuf,
    /// Kernel of dom0.
    pub(crate) kernel: Dom0Kernel,
    /// The folder of dom0's modules, if they are not those of the build root.
    modules: Option<PathBuf>,
}

impl Machines {
    /// Returns the build root, with the modules of dom0's kernel.
    pub(crate) fn root(&self) -> Result<Root> {
        with_modules(&self.build_root, self.modules.as_deref())
    }
}

/// Returns the build root, with these modules in place of the stock kernel's: their release is equal.
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

/// Builds missing parts of the machines, and the kernel tree, because a boot also needs a build: dom0's tree is made
/// while the compilers build the kernel's.
pub(crate) fn machines(kernel: Dom0Kernel) -> Result<Machines> {
    let stock = stock_machines()?;
    match kernel {
        Dom0Kernel::Stock => Ok(stock),
        Dom0Kernel::Checked => checked_machines(stock),
    }
}

/// Returns the machines with another kernel in dom0.
fn checked_machines(stock: Machines) -> Result<Machines> {
    let made = checked_kernel(&stock.build_root)?;
    let dom0_root = dom0_root()?;
    let modules = made
        .join("installed/lib/modules")
        .join(release(&stock.build_root)?);
    let inputs = [folder_name(&made)?, folder_name(&dom0_root)?];
    let kernel = BuiltKernel {
        image: Some(made.join("vmlinuz")),
        modules: Some(modules),
    };
    let dom0 = Artefact {
        name: "dom0-image-checked",
        title: "dom0's disk for the kernel with all checks",
        about: "20 s",
        inputs: [DOM0_INPUTS, &[&inputs[0], &inputs[1]]].concat(),
    }
    .get(|dir, log| {
        let image = Dom0Image::of_tests(&dom0_root);
        dom0_image(dir, log, &stock.build_root, &image, &kernel)
    })?;
    Ok(Machines {
        dom0,
        kernel: Dom0Kernel::Checked,
        modules: kernel.modules,
        ..stock
    })
}

/// Returns the machines with a dom0 whose first process is systemd, and that has no module and no program of this
/// project.
pub(crate) fn hosts() -> Result<Machines> {
    let stock = stock_machines()?;
    let root = host_root(&release(&stock.build_root)?)?;
    let ids = (folder_name(&stock.build_root)?, folder_name(&root)?);
    let dom0 = Artefact {
        name: "host-image",
        title: "the disk of a host with systemd",
        about: "20 s",
        inputs: vec![
            &ids.0,
            &ids.1,
            HOST_TEST,
            HOST_SERVICE,
            DOM0_INITRAMFS_INIT,
            INITRAMFS,
            DOM0_MODULES,
            FEWER_MODULES,
            HOST_SIZE,
        ],
    }
    .get(|dir, log| {
        let image = Dom0Image {
            tree: &root,
            first: FirstProcess::Systemd,
            size: HOST_SIZE,
        };
        dom0_image(dir, log, &stock.build_root, &image, &BuiltKernel::default())
    })?;
    Ok(Machines { dom0, ..stock })
}

/// Returns the machines with guests that have the stock kernel of another suite.
pub(crate) fn with_guests_of(suite: &'static str) -> Result<Machines> {
    let stock = stock_machines()?;
    let dom0_root = dom0_root()?;
    let kernel = guest_kernel(suite)?;
    let ids = (folder_name(&kernel)?, folder_name(&dom0_root)?);
    let guest = Artefact {
        name: "guest-initramfs-other",
        title: "the guests' initramfs for another kernel",
        about: "3 s",
        inputs: [&[ids.0.as_str(), &ids.1], GUEST_INPUTS].concat(),
    }
    .get(|dir, log| {
        let modules = kernel.join("modules");
        let root = with_modules(&stock.build_root, Some(&modules))?;
        initramfs(dir, "guest.cpio", log, root, &dom0_root, GUEST)
    })?;
    Ok(Machines {
        guest,
        guest_kernel: kernel.join("vmlinuz"),
        ..stock
    })
}

/// Returns the stock kernel of a suite for guests: `vmlinuz` and `modules`.
fn guest_kernel(suite: &'static str) -> Result<PathBuf> {
    host::prepare()?;
    let build_root = build_root()?;
    Artefact {
        name: "guest-kernel",
        title: "another kernel for guests",
        about: "30 s",
        inputs: vec![suite, GUEST_KERNEL],
    }
    .get(|dir, log| {
        let sources = host::sources_of(suite, &[""])?;
        unpacked(dir, log, suite, &sources, "linux-image-amd64")?;
        let root = Root::new(&build_root).bind(dir, "/mnt/a");
        run::logged(&mut root.script(GUEST_KERNEL), log)?;
        run::remove_tree(&dir.join("tree"))
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
    .get(|dir, log| {
        let image = Dom0Image::of_tests(&dom0_root);
        dom0_image(dir, log, &build_root, &image, &BuiltKernel::default())
    })?;
    let guest = Artefact {
        name: "guest-initramfs",
        title: "the guests' initramfs",
        about: "3 s",
        inputs: [&[ids.0.as_str(), &ids.1], GUEST_INPUTS].concat(),
    }
    .get(|dir, log| {
        let root = Root::new(&build_root);
        initramfs(dir, "guest.cpio", log, root, &dom0_root, GUEST)
    })?;
    Ok(Machines {
        build_root,
        guest_kernel: dom0.join("vmlinuz"),
        dom0,
        guest,
        kernel: Dom0Kernel::Stock,
        modules: None,
    })
}

/// Returns the release of the stock kernel in the build root.
pub(crate) fn release(build_root: &Path) -> Result<String> {
    Ok(fs::read_to_string(build_root.join("kernel-release"))?
        .trim()
        .to_string())
}

pub(crate) fn folder_name(path: &Path) -> Result<String> {
    Ok(path
        .file_name()
        .context("an artefact has a name")?
        .to_string_lossy()
        .into_owned())
}

/// Makes a Debian tree with the stock kernel of this release and its headers.
fn with_kernel(dir: &Path, log: &Path, packages: &str, release: &str) -> Result<()> {
    let packages = format!("{packages}\nlinux-headers-{release}");
    debian(dir, log, &packages, Some((KERNEL_HOOK, release)))
}

/// Makes a Debian tree like [`debian`], in which programs for arm64 can be built. `hook` gets that kernel's release.
pub(crate) fn debian_for_arm64(
    dir: &Path,
    log: &Path,
    packages: &str,
    hook: Option<(&str, &str)>,
) -> Result<()> {
    let both = "--architectures=amd64,arm64";
    debian_with(dir, log, packages, hook, &[both])
}

/// Makes a Debian tree of the target suite in `dir`. A hook gets the tree and a kernel's release.
fn debian(dir: &Path, log: &Path, packages: &str, hook: Option<(&str, &str)>) -> Result<()> {
    debian_with(dir, log, packages, hook, &[])
}

fn debian_with(
    dir: &Path,
    log: &Path,
    packages: &str,
    hook: Option<(&str, &str)>,
    options: &[&str],
) -> Result<()> {
    let sources = dir.with_extension("list");
    fs::write(&sources, host::sources()?)?;
    let mut command = bootstrap("minbase", packages);
    command.args(options);
    if let Some((text, release)) = hook {
        let file = dir.with_extension("hook");
        fs::write(&file, text)?;
        let call = format!("sh {} \"$1\" {release}", file.display());
        command.arg(format!("--customize-hook={call}"));
    }
    command.arg(host::SUITE).arg(dir).arg(&sources);
    run::logged(command.stdin(std::process::Stdio::null()), log)
}

/// Unpacks packages of a suite and all that they depend on in `dir/tree`, and installs none.
fn unpacked(dir: &Path, log: &Path, suite: &str, sources: &str, packages: &str) -> Result<()> {
    let list = dir.with_extension("list");
    fs::write(&list, sources)?;
    let mut command = bootstrap("extract", packages);
    command.arg(suite).arg(dir.join("tree")).arg(&list);
    run::logged(command.stdin(std::process::Stdio::null()), log)
}

/// Returns the command that makes a Debian tree with the packages of this list.
fn bootstrap(variant: &str, packages: &str) -> Command {
    let packages: Vec<&str> = packages
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(str::split_whitespace)
        .collect();
    let mut command = Command::new("mmdebstrap");
    command.arg(format!("--variant={variant}"));
    command.arg("--aptopt=Acquire::Languages \"none\"");
    command.arg(format!("--include={}", packages.join(",")));
    command
}

/// Inputs of dom0's disk besides programs.
const DOM0_INPUTS: &[&str] = &[
    DOM0_INIT,
    DOM0_INITRAMFS_INIT,
    INITRAMFS,
    DOM0_MODULES,
    DOM0_SIZE,
];

/// A kernel that was built here; missing parts are those of the stock kernel.
#[derive(Default)]
struct BuiltKernel {
    image: Option<PathBuf>,
    modules: Option<PathBuf>,
}

/// First process of a dom0.
enum FirstProcess {
    /// A script with only the steps that the tests need.
    Script,
    /// systemd, which starts the packages' services, and then the test.
    Systemd,
}

/// Inputs of a dom0's disk.
struct Dom0Image<'a> {
    tree: &'a Path,
    first: FirstProcess,
    size: &'static str,
}

impl Dom0Image<'_> {
    fn of_tests(tree: &Path) -> Dom0Image<'_> {
        Dom0Image {
            tree,
            first: FirstProcess::Script,
            size: DOM0_SIZE,
        }
    }
}

/// A module's package indexes all modules, which takes minutes in emulation, so the modules of devices that the machine
/// lacks are removed.
const FEWER_MODULES: &str = "cd /mnt/a/tree/usr/lib/modules/RELEASE/kernel
    rm -r sound net
    find drivers -mindepth 1 -maxdepth 1 ! -name block ! -name char ! -name md ! -name virtio ! -name xen \
        -exec rm -r {} +
    depmod -b /mnt/a/tree RELEASE";

/// Adds the files that run the test to a dom0's tree.
fn with_test(tree: &Path, first: &FirstProcess) -> Result<()> {
    let program = match first {
        FirstProcess::Script => {
            let init = tree.join("usr/sbin/init");
            // A package's init is a link to a program elsewhere: replace the link, not the program.
            if init.symlink_metadata().is_ok() {
                fs::remove_file(&init)?;
            }
            fs::write(&init, DOM0_INIT)?;
            init
        }
        FirstProcess::Systemd => {
            let unit = tree.join("etc/systemd/system/host-test.service");
            fs::write(unit, HOST_SERVICE)?;
            let program = tree.join("usr/local/sbin/host-test");
            fs::write(&program, HOST_TEST)?;
            program
        }
    };
    run::shown(Command::new("chmod").arg("+x").arg(&program))
}

fn dom0_image(
    dir: &Path,
    log: &Path,
    build_root: &Path,
    image: &Dom0Image<'_>,
    kernel: &BuiltKernel,
) -> Result<()> {
    let release = release(build_root)?;
    let tree = dir.join("tree");
    let stock = build_root.join(format!("usr/lib/modules/{release}"));
    run::logged(
        Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(image.tree)
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
    with_test(&tree, &image.first)?;
    if let Some(kernel) = &kernel.image {
        fs::copy(kernel, dir.join("vmlinuz"))?;
    }
    let root = Root::new(build_root).bind(dir, "/mnt/a");
    if matches!(image.first, FirstProcess::Systemd) {
        let script = FEWER_MODULES.replace("RELEASE", &release);
        run::logged(&mut root.script(&script), log)?;
    }
    let script = format!(
        "gunzip -c /mnt/a/tree/boot/xen-4.20-amd64.gz >/mnt/a/xen
         [ -e /mnt/a/vmlinuz ] ||
             cp $(ls /boot/vmlinuz-{release} /usr/lib/modules/{release}/vmlinuz 2>/dev/null | head -n1) /mnt/a/vmlinuz
         rm -f /mnt/a/tree/usr/lib/modules/{release}/vmlinuz
         truncate -s {} /mnt/a/dom0.img
         mkfs.ext4 -q -E lazy_itable_init=0 -d /mnt/a/tree /mnt/a/dom0.img",
        image.size
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
    initramfs(dir, "dom0.cpio", log, root, image.tree, init)
}

/// Inputs of a guest's initramfs besides programs.
const GUEST_INPUTS: &[&str] = &[
    GUEST_INIT,
    INITRAMFS,
    GUEST_MODULES,
    GUEST_PROGRAMS,
    GUEST_SHELLS,
];

/// Content of a guest's initramfs.
const GUEST: Initramfs = Initramfs {
    init: GUEST_INIT,
    modules: GUEST_MODULES,
    programs: GUEST_PROGRAMS,
    shells: GUEST_SHELLS,
};

/// Content of an initramfs besides busybox.
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
