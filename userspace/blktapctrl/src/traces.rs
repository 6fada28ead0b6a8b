// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files of traces: they are root's, wherever the administrator wants them, and outlive everything that is ours.

use crate::folder;
use crate::image::{Image, Opened};
use crate::log::{tell, LogContext};
use crate::record::TraceRecord;
use control::{Code, Failure, TraceTo};
use rustix::fs::{fallocate, FallocateFlags};
use rustix::io::Errno;
use rustix::rand::{getrandom, GetRandomFlags};
use rustix::time::{clock_gettime, ClockId};
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use trace::{TraceHeader, Writer, BLOCK};

/// Makes the file of a trace of a disk of `size` bytes. Its room is there from now on, where its file system can do that.
///
/// # Errors
/// There is one already, or the system refuses to; nothing is left of it then.
pub fn make(to: &TraceTo, minor: u32, size: u64) -> Result<TraceRecord, Failure> {
    let path = &to.path;
    let what = format!("cannot make the trace {}", path.display());
    let refused = |error: io::Error| {
        let mut failure = Failure::system(&what, &error);
        failure.message += match failure.code {
            Code::Exists => ": name a file that is not there, or remove that one",
            Code::NotFound => ": make its folder first",
            _ => "",
        };
        failure
    };
    let header = header(to, minor, size)?;
    let mut options = File::options();
    let options = options.read(true).write(true).create_new(true).mode(0o600);
    let file = options.open(path).map_err(refused)?;
    let made = || -> Result<TraceRecord, Failure> {
        reserve(&file, header.size()).map_err(refused)?;
        Writer::create(&file, &header).map_err(refused)?;
        let image = Image::find(path)?;
        Ok(TraceRecord {
            path: path.clone(),
            identity: image.identity(),
            born: image.born(),
            data: to.data,
            size: header.size(),
            at_ms: header.started_ms,
        })
    };
    made().inspect_err(|_| {
        // It is what was there a moment ago, and empty.
        if let Err(error) = folder::remove(path) {
            tell!(
                error,
                LogContext::disk(minor).because(&error),
                "cannot remove {}: {error}",
                path.display()
            );
        }
    })
}

/// Such a file system may have no room later: then the trace ends.
fn reserve(file: &File, size: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, size) {
        Err(Errno::OPNOTSUPP) => file.set_len(size),
        done => Ok(done?),
    }
}

fn header(to: &TraceTo, minor: u32, size: u64) -> Result<TraceHeader, Failure> {
    let (segment, segments) = TraceHeader::divide(to.size)?;
    let mut mark = [0; 8];
    getrandom(&mut mark, GetRandomFlags::empty())
        .map_err(|error| Failure::system("cannot get a random number", &error.into()))?;
    let now = clock_gettime(ClockId::Monotonic);
    let wall = SystemTime::now().duration_since(UNIX_EPOCH);
    let wall = wall.unwrap_or(Duration::ZERO).as_millis();
    Ok(TraceHeader {
        data: to.data,
        segment,
        segments,
        mark: u64::from_ne_bytes(mark),
        started_ms: u64::try_from(wall).unwrap_or(u64::MAX),
        // CAST: neither is negative.
        started_ns: now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64,
        sectors: size / BLOCK,
        minor,
    })
}

/// Opens it for the process that writes it.
///
/// # Errors
/// It is gone, or another file by now, or the system refuses to.
pub fn open(traced: &TraceRecord) -> Result<Opened, Failure> {
    let image = Image::find(&traced.path)?;
    if !image.is(Some(traced.identity), traced.born) {
        return Err(Failure::new(
            Code::NotFound,
            format!("{} is another file by now", traced.path.display()),
        ));
    }
    image.open(true, false)
}

/// Removes a trace file that no process writes.
///
/// # Errors
/// The system refuses to.
pub fn remove(traced: &TraceRecord) -> Result<(), Failure> {
    let path = &traced.path;
    folder::remove(path)
        .map_err(|error| Failure::system(format!("cannot remove {}", path.display()), &error))
}

#[cfg(test)]
mod tests {
    use super::{make, open, remove};
    use control::{Code, TraceTo};
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::path::PathBuf;
    use trace::Trace;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("traces-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        folder
    }

    #[test]
    fn a_file_is_made_once_and_is_root_s() {
        let folder = folder("made");
        let to = TraceTo {
            path: folder.join("t"),
            data: true,
            size: 16 << 20,
        };
        let traced = make(&to, 3, 1 << 20).expect("a trace");
        let data = fs::metadata(&to.path).expect("a file");
        assert_eq!(data.permissions().mode() & 0o777, 0o600);
        assert_eq!((data.len(), traced.size), (traced.size, (16 << 20) + 4096));
        // Its room is there.
        assert!(data.blocks() * 512 >= traced.size);
        let file = fs::File::open(&to.path).expect("a file");
        let header = *Trace::open(file).expect("a trace").header();
        assert_eq!((header.minor, header.sectors, header.data), (3, 2048, true));
        let again = make(&to, 3, 1 << 20).expect_err("it is there");
        assert_eq!(again.code, Code::Exists);
        assert!(again.message.contains("not there"), "{again}");
        assert!(to.path.exists());
        open(&traced).expect("the file");
        remove(&traced).expect("remove");
        assert_eq!(open(&traced).expect_err("gone").code, Code::NotFound);
        fs::write(&to.path, "another").expect("write");
        let other = open(&traced).expect_err("another");
        assert!(other.message.contains("another file"), "{other}");
        let nowhere = TraceTo {
            path: folder.join("none/t"),
            ..to
        };
        let none = make(&nowhere, 3, 1 << 20).expect_err("no folder");
        assert!(none.message.contains("make its folder"), "{none}");
        fs::remove_dir_all(folder).expect("remove");
    }
}
