// SPDX-License-Identifier: MIT OR Apache-2.0
//! NBD clients read where the disk has changed since its marks, by hand and with QEMU's tools.

use super::dirty_bitmap::{touched, MarkMemory, UNIT};
use super::nbd::{answer, any_chunk, chunk, client, option, send};
use crate::common::guest::{Guest, Step};
use crate::common::images::{answered, file, steps, Folder, SIZE};
use crate::common::watched::{Raw, Watched};
use crate::common::{Image, Process};
use control::tapdisk::{FdGrant, Open, Reply, Request, RequestedFile};
use control::{Changed, Channel, Code, Extent, Failure, Mark};
use ring::tap::shadow::Op;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use tapdev::fake::FakeTap;

/// A mark, whose name may be forgotten, and its map.
struct Noted {
    name: Option<String>,
    map: MarkMemory,
}

/// State of a supervisor: the marks, the oldest first, each numbered by its place.
#[derive(Default)]
struct KnownMarks {
    all: Vec<Noted>,
    /// Number of questions about marks.
    asked: usize,
}

#[derive(Clone, Default)]
struct Marks(Arc<Mutex<KnownMarks>>);

impl Marks {
    fn known(&self) -> MutexGuard<'_, KnownMarks> {
        self.0.lock().expect("nobody panics")
    }

    /// A mark is set.
    fn set(&self, name: &str, process: &mut Process) {
        let map = MarkMemory::new();
        map.given_to(process);
        let name = Some(name.to_owned());
        self.known().all.push(Noted { name, map });
    }

    /// Removes a mark.
    fn lose(&self, name: &str) {
        let named = |noted: &&mut Noted| noted.name.as_deref() == Some(name);
        let mut known = self.known();
        let noted = known.all.iter_mut().find(named).expect("a mark");
        noted.name = None;
    }

    /// Removes a mark while others exist, and reports that to the process.
    fn forget(&self, name: &str, process: &mut Process) {
        self.lose(name);
        assert_eq!(process.ask(Request::Unmarked, None), Ok(Reply::Done));
    }

    /// Returns the units that have changed since a mark.
    fn since(&self, name: &str) -> Vec<u64> {
        let known = self.known();
        let mut all = known.all.iter();
        let number = all.position(|noted| noted.name.as_deref() == Some(name));
        known.units(number.expect("a mark"))
    }

    /// Answers the questions of a process until its end.
    fn supervise(&self, process: &mut Process) -> JoinHandle<()> {
        let (idle, _other) = UnixStream::pair().expect("sockets");
        let mut channel = std::mem::replace(&mut process.needs, Channel::new(idle));
        channel.set_timeout(None).expect("a socket");
        let marks = self.clone();
        thread::spawn(move || {
            let mut after = 0;
            while let Ok(Reply::Needs { needs }) = channel.ask(Request::Needs { after }, &[]) {
                for need in needs {
                    after = after.max(need.number);
                    let (provided, map) = marks.known().answer(&need.what);
                    let question = Request::Provide {
                        number: need.number,
                        provided,
                        backing: None,
                    };
                    let fds: Vec<_> = map.iter().map(AsFd::as_fd).collect();
                    let told: Result<Reply, Failure> = channel.ask(&question, &fds);
                    if told.is_err() {
                        return;
                    }
                }
            }
        })
    }
}

impl KnownMarks {
    fn units(&self, number: usize) -> Vec<u64> {
        let maps = self.all.iter().skip(number);
        let mut units: Vec<u64> = maps.flat_map(|noted| noted.map.units()).collect();
        units.sort_unstable();
        units.dedup();
        units
    }

    fn answer(&mut self, what: &RequestedFile) -> (FdGrant, Option<OwnedFd>) {
        let refused = |why: &str| FdGrant::Refused(Failure::new(Code::NotFound, why));
        match what {
            RequestedFile::Notes => {
                let last = self.all.last().expect("a mark");
                (FdGrant::Shared, Some(last.map.descriptor()))
            }
            RequestedFile::Marks => {
                self.asked += 1;
                let mark = |(number, noted): (usize, &Noted)| {
                    let name = noted.name.as_ref()?.parse();
                    Some(Mark {
                        name: name.expect("a name"),
                        number: number as u64,
                        at_ms: 0,
                        unit: UNIT,
                    })
                };
                let marks = self.all.iter().enumerate().filter_map(mark);
                (FdGrant::Marks(marks.collect()), None)
            }
            RequestedFile::Changed { mark, size, from } => {
                self.asked += 1;
                assert_eq!(*size, SIZE);
                let place = *mark as usize;
                let named = |noted: &Noted| noted.name.is_some();
                match self.all.get(place).is_some_and(named) {
                    true => (FdGrant::Changed(self.changed(place, *from)), None),
                    false => (refused("there is no such mark"), None),
                }
            }
            _ => (refused("it is not for a test"), None),
        }
    }

    /// Returns a few units at a time, so that one answer is not enough.
    fn changed(&self, place: usize, from: u64) -> Changed {
        const MOST: usize = 40;
        let mut units = self.units(place);
        units.retain(|unit| *unit >= from / UNIT);
        let next = (units.len() > MOST).then(|| units[MOST] * UNIT);
        units.truncate(MOST);
        let extent = |unit: u64| Extent {
            offset: unit * UNIT,
            length: UNIT.min(SIZE - unit * UNIT),
        };
        Changed {
            mark: place as u64,
            size: SIZE,
            extents: units.into_iter().map(extent).collect(),
            next,
        }
    }
}

/// A process that serves an image, also to NBD clients at a socket in a folder.
fn serving(image: &Raw, fake: &FakeTap, marks: &Marks, folder: &Path) -> (Process, JoinHandle<()>) {
    let open = image.open(&Watched::default());
    serving_as(open, image, fake, marks, folder)
}

/// A process that serves an image as `open` says, also to NBD clients.
fn serving_as(
    open: Open,
    image: &Raw,
    fake: &FakeTap,
    marks: &Marks,
    folder: &Path,
) -> (Process, JoinHandle<()>) {
    let mut process = Process::start(fake);
    let supervisor = marks.supervise(&mut process);
    let noted = !marks.known().all.is_empty();
    let question = Request::Open(Open {
        notes: noted.then_some(UNIT),
        ..open
    });
    let opened = process.ask_with(question, file(&image.0, true).as_fd());
    assert!(matches!(opened, Ok(Reply::Disk(_))), "{opened:?}");
    let socket = folder.join("nbd");
    if socket.exists() {
        std::fs::remove_file(&socket).expect("remove");
    }
    let listener = UnixListener::bind(socket).expect("a socket");
    let nbd = Request::Nbd {
        export: "disk".into(),
    };
    assert_eq!(process.ask_with(nbd, listener.as_fd()), Ok(Reply::Done));
    (process, supervisor)
}

/// Chooses metadata contexts of extents.
fn meant(socket: &mut UnixStream, number: u32, names: &[&str]) -> Vec<(u32, String)> {
    let mut data = b"\0\0\0\x04disk".to_vec();
    data.extend((names.len() as u32).to_be_bytes());
    for name in names {
        data.extend((name.len() as u32).to_be_bytes());
        data.extend(name.as_bytes());
    }
    option(socket, number, &data);
    let mut all = Vec::new();
    loop {
        match answer(socket) {
            (1, rest) => {
                assert!(rest.is_empty());
                return all;
            }
            (4, context) => {
                let (number, name) = context.split_first_chunk().expect("a number");
                let name = String::from_utf8(name.to_vec()).expect("a name");
                all.push((u32::from_be_bytes(*number), name));
            }
            other => panic!("{other:?}"),
        }
    }
}

const LIST: u32 = 9;
const SET: u32 = 10;

/// A client that knows chunks.
fn knowing_chunks(folder: &Path) -> UnixStream {
    let mut socket = client(folder);
    option(&mut socket, 8, b"");
    assert_eq!(answer(&mut socket).0, 1);
    socket
}

/// Connects a client that is served, and chooses these contexts.
fn told_of(folder: &Path, names: &[&str]) -> UnixStream {
    let mut socket = knowing_chunks(folder);
    let meant = meant(&mut socket, SET, names);
    let wanted = (1..).zip(names.iter().map(|name| (*name).to_owned()));
    assert_eq!(meant, wanted.collect::<Vec<_>>());
    option(&mut socket, 7, b"\0\0\0\x04disk\0\0");
    while answer(&mut socket).0 == 3 {}
    socket
}

fn name(mark: &str) -> String {
    format!("qemu:dirty-bitmap:{mark}")
}

/// The lengths and states in a chunk of a context.
fn states(chunk: (u16, Vec<u8>), number: u32) -> Vec<(u32, u32)> {
    let (kind, content) = chunk;
    assert_eq!(kind, 5, "{}", String::from_utf8_lossy(&content));
    let words = content.chunks_exact(4);
    let words = words.map(|word| u32::from_be_bytes(word.try_into().expect("a word")));
    let words: Vec<u32> = words.collect();
    assert_eq!(words[0], number);
    words[1..]
        .chunks_exact(2)
        .map(|pair| (pair[0], pair[1]))
        .collect()
}

/// Returns all units of the disk that a client sees as changed.
fn dirty(socket: &mut UnixStream) -> Vec<u64> {
    let (mut at, mut units) = (0, Vec::new());
    while at < SIZE {
        send(socket, 7, at, (SIZE - at) as u32, b"");
        for (len, state) in states(chunk(socket), 1) {
            let next = at + u64::from(len);
            assert!(state <= 1 && next <= SIZE && len > 0);
            if state == 1 {
                units.extend(at / UNIT..next.div_ceil(UNIT));
            }
            at = next;
        }
    }
    units
}

/// Checks that the answer is an error that names the mark.
fn unknown(socket: &mut UnixStream, mark: &str) {
    send(socket, 7, 0, SIZE as u32, b"");
    let (kind, content) = chunk(socket);
    assert_eq!((kind, &content[..4]), (1 << 15 | 1, &[0, 0, 0, 5][..]));
    let len = usize::from(u16::from_be_bytes([content[4], content[5]]));
    let why = std::str::from_utf8(&content[6..]).expect("a text");
    assert_eq!(why.len(), len);
    assert!(why.contains(&format!("the dirty bitmap {mark}")), "{why}");
    assert!(why.contains("copy all of the disk"), "{why}");
}

/// A raw image of zeroes, its node, and a folder for its socket.
fn bed() -> (Image, Raw, FakeTap, tempfile::TempDir) {
    let image = Image::new(SIZE);
    let raw = Raw(image.0.path().to_path_buf());
    let fake = FakeTap::new(16).expect("a node");
    let folder = tempfile::tempdir().expect("a folder");
    (image, raw, fake, folder)
}

/// The guest writes something in a unit.
fn write(fake: &FakeTap, unit: u64) {
    answered(fake, Op::Write, unit * UNIT / 512 + 1, &[7; 512]);
}

#[test]
fn client_finds_the_marks() {
    let (_image, raw, fake, folder) = bed();
    let (marks, folder) = (Marks::default(), folder.path());
    let (mut process, supervisor) = serving(&raw, &fake, &marks, folder);
    let allocation = "base:allocation";
    let mut socket = knowing_chunks(folder);
    // Without a dirty bitmap there is no question to the supervisor.
    assert_eq!(meant(&mut socket, LIST, &[]), [(1, allocation.to_owned())]);
    assert_eq!(meant(&mut socket, SET, &[&name("a")]), []);
    assert_eq!(marks.known().asked, 0);
    for mark in ["a", "ab"] {
        marks.set(mark, &mut process);
    }
    let (a, ab) = (name("a"), name("ab"));
    let all: &[&str] = &[allocation, &a, &ab];
    for (number, queries, found) in [
        (LIST, &[][..], all),
        (LIST, &["qemu:"], &all[1..]),
        (LIST, &["qemu:dirty-bitmap:"], &all[1..]),
        (LIST, &[&ab, "base:"], &[allocation, &ab]),
        (LIST, &["other:", "qemu"], &[]),
        (SET, &["qemu:", "base:", &name("b")], &[]),
        (SET, &[], &[]),
        (SET, &[&ab, allocation, &ab], &[allocation, &ab]),
    ] {
        let meant = meant(&mut socket, number, queries);
        let found: Vec<_> = (1..)
            .zip(found.iter().map(|name| (*name).to_owned()))
            .collect();
        assert_eq!(meant, found, "{number} {queries:?}");
    }
    process.exit();
    supervisor.join().expect("no panic");
}

#[test]
fn client_is_told_of_all_that_was_answered() {
    let (_image, raw, fake, folder) = bed();
    let (marks, folder) = (Marks::default(), folder.path());
    let (mut process, supervisor) = serving(&raw, &fake, &marks, folder);
    write(&fake, 1);
    marks.set("a", &mut process);
    write(&fake, 2);
    let mut both = told_of(folder, &["base:allocation", &name("a")]);
    let mut alone = told_of(folder, &[&name("a")]);
    assert_eq!(dirty(&mut alone), [2]);
    let asked = marks.known().asked;
    for unit in [4, 5, 1280] {
        write(&fake, unit);
        assert!(dirty(&mut alone).contains(&unit));
    }
    assert_eq!(dirty(&mut alone), [2, 4, 5, 1280]);
    let unit = UNIT as u32;
    send(&mut both, 7, 0, 4 * unit, b"");
    let (is_last, kind, content) = any_chunk(&mut both);
    assert!(!is_last);
    let allocation = [(unit, 3), (2 * unit, 0), (unit, 3)];
    assert_eq!(states((kind, content), 1), allocation);
    let changed = [(2 * unit, 0), (unit, 1), (unit, 0)];
    assert_eq!(states(chunk(&mut both), 2), changed);
    assert_eq!(marks.known().asked, asked, "it is known already");
    // Changes after the next mark are also changes since the one before.
    marks.set("b", &mut process);
    let mut later = told_of(folder, &[&name("b")]);
    assert!(dirty(&mut later).is_empty());
    write(&fake, 3);
    assert_eq!(dirty(&mut later), [3]);
    assert_eq!(dirty(&mut alone), [2, 3, 4, 5, 1280]);
    send(&mut alone, 7, SIZE - 512, 1024, b"");
    assert_eq!(chunk(&mut alone).1[..4], [0, 0, 0, 22], "no such range");
    process.exit();
    supervisor.join().expect("no panic");
}

#[test]
fn client_never_takes_a_mark_that_is_gone_for_nothing_changed() {
    let (_image, raw, fake, folder) = bed();
    let (marks, folder) = (Marks::default(), folder.path());
    let (mut process, supervisor) = serving(&raw, &fake, &marks, folder);
    marks.set("a", &mut process);
    marks.set("b", &mut process);
    let mut first = told_of(folder, &[&name("a")]);
    let mut second = told_of(folder, &[&name("b")]);
    assert_eq!((dirty(&mut first), dirty(&mut second)), (vec![], vec![]));
    marks.forget("a", &mut process);
    unknown(&mut first, "a");
    // A new mark of that name is another mark.
    marks.set("a", &mut process);
    unknown(&mut first, "a");
    write(&fake, 3);
    assert_eq!(dirty(&mut second), [3]);
    // The process finds out itself what became of it while the disk was paused.
    let mut other = told_of(folder, &[&name("a")]);
    assert_eq!(dirty(&mut other), [3]);
    for (gone, socket, notes) in [("b", &mut second, Some(UNIT)), ("a", &mut other, None)] {
        assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
        marks.lose(gone);
        let question = Request::Unpause(Open {
            notes,
            ..raw.open(&Watched::default())
        });
        let opened = process.ask_with(question, file(&raw.0, true).as_fd());
        assert!(matches!(opened, Ok(Reply::Disk(_))), "{opened:?}");
        unknown(socket, gone);
    }
    // That also holds while another mark exists.
    marks.set("c", &mut process);
    unknown(&mut second, "b");
    let mut third = told_of(folder, &[&name("c")]);
    assert!(dirty(&mut third).is_empty());
    let end = process.ask(Request::Note { unit: None }, None);
    assert_eq!(end, Ok(Reply::Done));
    unknown(&mut third, "c");
    process.exit();
    supervisor.join().expect("no panic");
}

/// A client reads the bitmaps of the image beside the marks, until the image is opened again. A mark hides the one that
/// has its name.
#[test]
fn bitmaps_of_the_image_are_beside_the_marks() {
    let Some(folder) = Folder::new("bitmaps_of_the_image_are_beside_the_marks") else {
        return;
    };
    let size = SIZE.to_string();
    folder.img(&["create", "-q", "-f", "qcow2", "a.qcow2", &size]);
    for bitmap in ["a", "b"] {
        let granule = UNIT.to_string();
        let add = ["bitmap", "--add", "-g", &granule, "-f", "qcow2", "a.qcow2"];
        folder.img(&[&add[..], &[bitmap]].concat());
    }
    let (raw, fake) = (
        Raw(folder.path("a.qcow2")),
        FakeTap::new(16).expect("a node"),
    );
    let (marks, place) = (Marks::default(), folder.path(""));
    let target = format!("qcow2:{}", raw.0.display());
    let open = Open {
        may_ask: true,
        ..Open::new(target.parse().expect("a target"))
    };
    let (mut process, supervisor) = serving_as(open.clone(), &raw, &fake, &marks, &place);
    let (a, b) = (name("a"), name("b"));
    let all = [(1, a.clone()), (2, b.clone())];
    let mut socket = knowing_chunks(&place);
    assert_eq!(meant(&mut socket, LIST, &["qemu:"]), all);
    let mut both = [told_of(&place, &[&a]), told_of(&place, &[&b])];
    write(&fake, 3);
    for stored in &mut both {
        assert_eq!(dirty(stored), [3]);
    }
    marks.set("a", &mut process);
    assert_eq!(meant(&mut socket, LIST, &["qemu:"]), all);
    let mut mark = told_of(&place, &[&a]);
    write(&fake, 5);
    assert_eq!(dirty(&mut mark), [5]);
    for stored in &mut both {
        assert_eq!(dirty(stored), [3, 5]);
    }
    send(&mut both[1], 7, SIZE - 512, 1024, b"");
    assert_eq!(chunk(&mut both[1]).1[..4], [0, 0, 0, 22], "no such range");
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    // While the disk is paused, another program may reset the bitmaps.
    folder.img(&["bitmap", "--clear", "-f", "qcow2", "a.qcow2", "b"]);
    let question = Request::Unpause(Open {
        notes: Some(UNIT),
        ..open
    });
    let opened = process.ask_with(question, file(&raw.0, true).as_fd());
    assert!(matches!(opened, Ok(Reply::Disk(_))), "{opened:?}");
    assert_eq!(dirty(&mut mark), [5]);
    for stored in &mut both {
        send(stored, 7, 0, SIZE as u32, b"");
        let (kind, content) = chunk(stored);
        assert_eq!((kind, &content[..4]), (1 << 15 | 1, &[0, 0, 0, 5][..]));
        let why = std::str::from_utf8(&content[6..]).expect("a text");
        assert!(why.contains("connect again"), "{why}");
    }
    assert!(dirty(&mut told_of(&place, &[&b])).is_empty());
    process.exit();
    supervisor.join().expect("no panic");
}

/// Returns the units that QEMU reports as changed since a mark.
fn mapped(folder: &Folder, mark: &str) -> Vec<u64> {
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export=disk,x-dirty-bitmap={}",
        folder.path("nbd").display(),
        name(mark)
    );
    let text = folder.img(&["map", "--output=json", "--image-opts", &image]);
    let map: Vec<serde_json::Value> = serde_json::from_str(&text).expect("json");
    let mut at = 0;
    let mut units = Vec::new();
    for part in &map {
        let number = |key: &str| part[key].as_u64().expect("a number");
        assert_eq!(number("start"), at, "{text}");
        let end = at + number("length");
        // QEMU shows a changed range as a hole.
        if part["data"] == false {
            units.extend(at / UNIT..end.div_ceil(UNIT));
        }
        at = end;
    }
    assert_eq!(at, SIZE, "{text}");
    units
}

/// Marks come and go and processes die, and QEMU's tools always read exactly the guest's changes; so does a client that
/// has been connected since the mark, or since the process began.
#[test]
fn tools_of_qemu_are_told_what_has_changed() {
    let Some(folder) = Folder::new("tools_of_qemu_are_told_what_has_changed") else {
        return;
    };
    let (model, fake) = (folder.raw("a.img", 5), FakeTap::new(16).expect("a node"));
    let (raw, marks) = (Raw(folder.path("a.img")), Marks::default());
    let place = folder.path("");
    let mut running = serving(&raw, &fake, &marks, &place);
    let mut guest = Guest::new(&fake, model, 8);
    // Names, and the steps that were done before.
    let mut set: Vec<(String, usize)> = Vec::new();
    let mut clients: Vec<(String, UnixStream)> = Vec::new();
    let steps = steps();
    let mut checked = 0;
    for (number, step) in steps.iter().enumerate() {
        if number % 45 == 30 {
            guest.finish();
            let mark = format!("m{number}");
            marks.set(&mark, &mut running.0);
            set.push((mark, number));
        }
        if number % 100 == 95 {
            let (mark, _) = set.remove(set.len() / 2);
            marks.forget(&mark, &mut running.0);
            clients.retain_mut(|(known, socket)| {
                let stays = *known != mark;
                if !stays {
                    unknown(socket, &mark);
                }
                stays
            });
        }
        if matches!(step, Step::Kill) {
            running.0.kill();
            running.1.join().expect("no panic");
            running = serving(&raw, &fake, &marks, &place);
            clients.clear();
        }
        guest.send(step);
        if number % 20 != 19 {
            continue;
        }
        guest.finish();
        for (mark, since) in &set {
            let done = touched(&steps[*since..=number]);
            assert_eq!(marks.since(mark), done);
            assert_eq!(mapped(&folder, mark), done, "{mark} at {number}");
            if !clients.iter().any(|(known, _)| known == mark) {
                clients.push((mark.clone(), told_of(&place, &[&name(mark)])));
            }
            checked += usize::from(!done.is_empty());
        }
        for (mark, socket) in &mut clients {
            assert_eq!(dirty(socket), marks.since(mark), "{mark} at {number}");
        }
    }
    guest.finish();
    running.0.exit();
    running.1.join().expect("no panic");
    assert!(checked > 20, "{checked}");
}
