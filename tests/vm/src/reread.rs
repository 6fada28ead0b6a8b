// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Reads a disk into memory again and again, and checks later whether the data is still there.
//!
//! Runs in a guest that moves. A page that a device has changed in a guest's memory is sent only if the backend marks
//! it as dirty in time, so on the other side a page may hold its old content. Other tests do not see that, because they
//! judge a read when it is answered, on the side that executed it.

use crate::memory::Aligned;
use anyhow::{bail, ensure, Context, Result};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes of one read, which are many segments of a request.
const BLOCK: usize = 64 << 10;
/// Bytes of a sector; each sector carries the number of its block.
const SECTOR: usize = 512;
/// Distance of the blocks that one place in memory gets, one after the other; it has no common divisor with their
/// number.
const STEP: u64 = 13;

/// Work to do.
#[derive(clap::Args)]
pub(crate) struct RereadArgs {
    /// The disk.
    device: PathBuf,
    /// Fill the disk for later reads, and do nothing else.
    #[arg(long, conflicts_with = "until")]
    fill: bool,
    /// MiB of the disk that are used.
    #[arg(long, default_value_t = 16)]
    mib: u64,
    /// Reads that are in flight at once.
    #[arg(long, default_value_t = 8)]
    threads: u64,
    /// Places in memory for each thread; the data of a read stays there until the place's next turn.
    #[arg(long, default_value_t = 48)]
    places: u64,
    /// Milliseconds between two reads of one thread: a place must not be read again before what it holds was sent, or it
    /// is sent once more whoever says so.
    #[arg(long, default_value_t = 100)]
    pause_ms: u64,
    /// Continue until this file exists.
    #[arg(long, required_unless_present = "fill")]
    until: Option<PathBuf>,
}

/// Does it, and fails if something is not there any more.
pub(crate) fn main(args: &RereadArgs) -> Result<()> {
    let blocks = (args.mib << 20) / BLOCK as u64;
    ensure!(
        blocks % STEP != 0 && blocks > args.places,
        "--mib must have more blocks of 64 KiB than --places, and no multiple of {STEP} of them"
    );
    let disk = open(&args.device)?;
    let Some(until) = args.until.as_deref() else {
        return fill(&disk, blocks);
    };
    let reads = std::thread::scope(|scope| {
        let disk = &disk;
        let threads: Vec<_> = (0..args.threads)
            .map(|thread| scope.spawn(move || read(args, disk, blocks, until, thread)))
            .collect();
        threads.into_iter().try_fold(0, |sum, thread| {
            let reads = thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            anyhow::Ok(sum + reads?)
        })
    })?;
    println!("reread: {reads} reads, all were there when their turn came again");
    Ok(())
}

fn open(device: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let file = options.custom_flags(libc::O_DIRECT).open(device);
    file.with_context(|| format!("cannot open {}", device.display()))
}

fn fill(disk: &File, blocks: u64) -> Result<()> {
    let mut memory = Aligned::new(BLOCK);
    for block in 0..blocks {
        let bytes = memory.get(BLOCK);
        for sector in bytes.chunks_exact_mut(SECTOR) {
            sector.fill(0);
            sector[..8].copy_from_slice(&block.to_le_bytes());
        }
        disk.write_all_at(bytes, block * BLOCK as u64)
            .with_context(|| format!("cannot write block {block}"))?;
    }
    Ok(())
}

/// Returns the blocks whose sectors are in `bytes`, except this one.
fn others(bytes: &[u8], block: u64) -> Vec<u64> {
    let holds = |sector: &[u8]| u64::from_le_bytes(std::array::from_fn(|at| sector[at]));
    let found = bytes.chunks_exact(SECTOR).map(holds);
    found.filter(|&found| found != block).collect()
}

/// Reads one block after the other, each to the next place; returns how many.
fn read(args: &RereadArgs, disk: &File, blocks: u64, until: &Path, thread: u64) -> Result<u64> {
    let mut places: Vec<_> = (0..args.places).map(|_| Aligned::new(BLOCK)).collect();
    let mut held: Vec<Option<u64>> = vec![None; places.len()];
    let pause = Duration::from_millis(args.pause_ms);
    let (mut block, mut reads) = (thread * args.places % blocks, 0);
    while !until.exists() {
        for (place, held) in places.iter_mut().zip(&mut held) {
            let bytes = place.get(BLOCK);
            look(bytes, *held)?;
            disk.read_exact_at(bytes, block * BLOCK as u64)
                .with_context(|| format!("cannot read block {block}"))?;
            let wrong = others(bytes, block);
            ensure!(wrong.is_empty(), "block {block} was read as {wrong:?}");
            *held = Some(block);
            block = (block + STEP) % blocks;
            reads += 1;
            std::thread::sleep(pause);
        }
    }
    for (place, held) in places.iter_mut().zip(held) {
        look(place.get(BLOCK), held)?;
    }
    Ok(reads)
}

/// Checks that the content of a place has not changed.
fn look(bytes: &[u8], held: Option<u64>) -> Result<()> {
    let Some(block) = held else { return Ok(()) };
    let wrong = others(bytes, block);
    if !wrong.is_empty() {
        bail!(
            "block {block} was read and is not there any more: {} of {} sectors are of blocks {wrong:?}",
            wrong.len(),
            bytes.len() / SECTOR
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{look, BLOCK, SECTOR};

    fn block(number: u64) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK];
        for sector in bytes.chunks_exact_mut(SECTOR) {
            sector[..8].copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn one_old_sector_is_found() {
        let mut bytes = block(7);
        look(&bytes, Some(7)).unwrap();
        bytes[5 * SECTOR] = 3;
        let found = look(&bytes, Some(7)).unwrap_err().to_string();
        assert!(found.contains("not there any more: 1 of 128"), "{found}");
    }
}
