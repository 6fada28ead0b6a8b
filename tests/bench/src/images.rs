// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Images and exports, made by QEMU's tools.

use crate::sh;
use anyhow::Result;
use std::path::Path;

/// Socket of QEMU's NBD server, and its number.
pub(crate) const EXPORT: &str = "/run/bench.nbd";
const SERVER: &str = "/run/bench-nbd.pid";
/// Key of the encrypted image.
const KEY: &str = "/run/bench.key";
/// Number of images in a chain, including the raw one at its end.
const CHAIN: u32 = 10;
/// Commands for qemu-io.
const WRITES: &str = "/run/bench-writes";

/// Writes all data of a disk to an image.
pub(crate) fn convert(disk: &str, format: &str, image: &str) -> Result<()> {
    // Without a search for zeroes, so that all of it is allocated. With direct I/O, because dom0 would otherwise write
    // the image back during the measurement.
    let convert = ["qemu-img", "convert", "-t", "none", "-S", "0"];
    let what = ["-f", "raw", "-O", format, disk, image];
    sh::run(&[&convert[..], &what].concat()).map(drop)
}

/// Writes all data of a disk to an encrypted image with a new key.
pub(crate) fn seal(disk: &str, image: &str, mib: u32) -> Result<()> {
    sh::shell(&format!(
        "umask 077; head -c 32 /dev/urandom | base64 -w 0 > {KEY}"
    ))?;
    let key = format!("secret,id=s,file={KEY}");
    // The key derivation time affects only the attach.
    let options = "key-secret=s,iter-time=10";
    let size = format!("{mib}M");
    let create = ["qemu-img", "create", "-q", "--object", &key, "-f", "luks"];
    sh::run(&[&create[..], &["-o", options, image, &size]].concat())?;
    let target = format!("driver=luks,key-secret=s,file.filename={image}");
    let convert = ["qemu-img", "convert", "-n", "-t", "none", "-S", "0"];
    let convert = [&convert[..], &["--object", &key]].concat();
    let source = ["-f", "raw", disk, "--target-image-opts", &target];
    sh::run(&[&convert[..], &source].concat()).map(drop)
}

/// Makes a new image with another one as its backing image.
pub(crate) fn over(below: &str, format: &str, image: &str) -> Result<()> {
    let over = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", format];
    sh::run(&[&over[..], &["-b", below, image]].concat()).map(drop)
}

/// Makes an image that has allocated nothing.
pub(crate) fn empty(image: &str, mib: u32) -> Result<()> {
    let new = ["qemu-img", "create", "-q", "-f", "qcow2", image];
    sh::run(&[&new[..], &[&format!("{mib}M")]].concat()).map(drop)
}

/// Makes a chain of images, from a raw one at `bottom` to `top`, that contain the disk together: each image has one of
/// every [`CHAIN`] clusters.
pub(crate) fn chain(bottom: &str, top: &str, mib: u32) -> Result<()> {
    let (mut below, mut format) = (bottom.to_owned(), "raw");
    sh::run(&["truncate", "--size", &format!("{mib}M"), bottom])?;
    write_part(&below, format, 0, mib)?;
    for number in 1..CHAIN {
        sh::run(&["chmod", "a-w", &below])?;
        let path = match number + 1 {
            CHAIN => top.to_owned(),
            _ => format!("{bottom}.{number}"),
        };
        over(&below, format, &path)?;
        (below, format) = (path, "qcow2");
        write_part(&below, format, number, mib)?;
    }
    Ok(())
}

/// Writes the clusters of a disk that the image of this number must have.
fn write_part(image: &str, format: &str, number: u32, mib: u32) -> Result<()> {
    let clusters = (number..mib * 16).step_by(CHAIN as usize);
    let writes = clusters.map(|cluster| format!("write -q {}k 64k\n", cluster * 64));
    std::fs::write(WRITES, writes.collect::<String>())?;
    sh::shell(&format!("qemu-io -t none -f {format} {image} < {WRITES}")).map(drop)
}

/// Exports a disk by QEMU's server, with direct I/O. The server must keep its heap memory: otherwise it would free and
/// allocate 257 pages for each MiB with each request or not, depending on the history of its heap, and that would
/// dominate the measurement.
pub(crate) fn serve(disk: &str) -> Result<()> {
    let server = [
        "env",
        "MALLOC_MMAP_THRESHOLD_=1073741824",
        "MALLOC_TRIM_THRESHOLD_=1073741824",
        "qemu-nbd",
        "--fork",
        "--persistent",
        "--format=raw",
        "--cache=none",
        "--export-name=disk",
    ];
    let place = ["--socket", EXPORT, "--pid-file", SERVER, disk];
    sh::run(&[&server[..], &place].concat()).map(drop)
}

/// Stops the server, if there is one, and waits for its end.
pub(crate) fn end_server() -> Result<()> {
    let Ok(pid) = std::fs::read_to_string(SERVER) else {
        return Ok(());
    };
    let process = Path::new("/proc").join(pid.trim());
    sh::run(&["kill", pid.trim()])?;
    sh::wait_for("the end of qemu-nbd", || Ok(!process.exists()))?;
    Ok(std::fs::remove_file(SERVER)?)
}
