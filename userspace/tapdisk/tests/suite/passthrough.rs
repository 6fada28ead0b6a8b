// SPDX-License-Identifier: MIT OR Apache-2.0
//! Passthrough: the mappings that the kernel gets, and when they are revoked.

use crate::common::{Process, SECTORS, SIZE};
use control::tapdisk::{OnError, Open, Reply, Request, Rules, State};
use control::{Code, Failure};
use diskio::{Bytes, Data, Errno, Io};
use drivers::{Attributes, Disk, DiskInfo, Driver, Fence, Holder, MappedExtent};
use ring::response::ResponseStatus;
use ring::tap::shadow::Op;
use rustix::event::{eventfd, EventfdFlags};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use tapdev::abi::{
    MapOp, MAP_FLUSH, MAP_NO_BACKING, MAP_READ, MAP_RECALL, MAP_SET, MAP_WRITE, MAP_ZERO,
};
use tapdev::fake::FakeTap;

/// A device whose mappings the kernel gets.
#[derive(Clone)]
struct MappedDevice {
    kernel: FakeTap,
    is_verbatim: bool,
    /// Size at first, and size after a resize.
    first_size: u64,
    size: u64,
    write_fails: bool,
    flush_fails: bool,
    /// Places in the image, if the disk is not there byte for byte.
    places: Option<Vec<MappedExtent>>,
    /// True if the places appear with the first request.
    comes: bool,
    was_asked: Arc<AtomicBool>,
    /// True after a look-up that came before the first request.
    was_looked_for: Arc<AtomicBool>,
    /// Discards end, and places are found, when this can be read.
    goes_on: Arc<OwnedFd>,
    /// Mappings that the kernel had when the image was closed.
    told: Arc<Mutex<Vec<MapOp>>>,
}

impl MappedDevice {
    fn new(kernel: &FakeTap) -> Self {
        kernel.back(1);
        Self {
            kernel: kernel.clone(),
            is_verbatim: true,
            first_size: SIZE,
            size: SIZE,
            write_fails: false,
            flush_fails: false,
            places: None,
            comes: false,
            was_asked: Arc::default(),
            was_looked_for: Arc::default(),
            goes_on: Arc::new(eventfd(1, EventfdFlags::CLOEXEC).unwrap()),
            told: Arc::default(),
        }
    }

    /// Makes an image that gets a part of the disk with the first request; the kernel may write half of it.
    fn in_parts(kernel: &FakeTap) -> Self {
        let place = |offset, at, writable| MappedExtent {
            offset,
            len: 4096,
            holder: Holder::Image,
            at,
            writable,
        };
        Self {
            is_verbatim: false,
            places: Some(vec![place(0, 8192, true), place(8192, 65536, false)]),
            comes: true,
            ..Self::new(kernel)
        }
    }

    /// Makes a device whose discards do not end until [`MappedDevice::go_on`].
    fn slow(kernel: &FakeTap) -> Self {
        Self {
            goes_on: Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap()),
            ..Self::new(kernel)
        }
    }

    fn go_on(&self) {
        rustix::io::write(&self.goes_on, &1_u64.to_ne_bytes()).unwrap();
    }

    /// A process that serves it.
    fn serve(&self, change: impl FnOnce(&mut Open) + Send + 'static) -> Process {
        let device = self.clone();
        let process = Process::start_with(&self.kernel, move |session| {
            let its = session.clone();
            let io = session.runtime().io.clone();
            io.start_helpers(1).unwrap();
            session.runtime().tasks.spawn(async move {
                let disk = Disk::new(ServedDevice { device, io });
                let shape = disk.activate().await.unwrap();
                let mut open = Open::new("null:1M".parse().unwrap());
                change(&mut open);
                its.serve_disk(open, disk, shape).await.unwrap();
            });
        });
        self.kernel.wait_for_params();
        // A look-up before the first request would send mappings, too.
        while self.comes && !self.was_looked_for.load(Ordering::Relaxed) {
            thread::yield_now();
        }
        process
    }

    /// A request of the guest that is answered by the process.
    fn request(&self, op: Op) -> ResponseStatus {
        let tag = match op {
            Op::Flush => self.kernel.send(op, 0, &[], false),
            // Beside all discards, which it would have to wait for.
            Op::Read | Op::Write => self.kernel.send(op, 512, &[1; 512], false),
            _ => self.kernel.send_range(op, 8, 8),
        };
        self.kernel.answer(tag.unwrap(), 0).unwrap().0
    }

    /// Returns the mappings that the kernel got when all work is done. The process sends a mapping in the turn in which
    /// it fetches the request, or in an earlier one.
    fn told(&self) -> Vec<MapOp> {
        assert_eq!(self.request(Op::Read), ResponseStatus::Okay);
        assert_eq!(self.request(Op::Read), ResponseStatus::Okay);
        self.kernel.map_ops()
    }
}

struct ServedDevice {
    device: MappedDevice,
    io: Io,
}

impl ServedDevice {
    fn note(&self) -> Result<(), Errno> {
        let mut told = self.device.told.lock().unwrap();
        if told.is_empty() {
            *told = self.device.kernel.map_ops();
        }
        Ok(())
    }
}

impl Driver for ServedDevice {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        Ok(DiskInfo {
            discard: Some(512),
            size: self.device.first_size,
            ..crate::common::shape(true)
        })
    }
    fn fence(&self) -> Fence {
        Fence::Local
    }
    fn is_verbatim(&self) -> bool {
        self.device.is_verbatim
    }
    fn has_places(&self) -> bool {
        self.device.places.is_some()
    }
    async fn places(&self, from: u64, len: u64) -> Result<Vec<MappedExtent>, Errno> {
        if self.device.comes && !self.device.was_asked.load(Ordering::Relaxed) {
            self.device.was_looked_for.store(true, Ordering::Relaxed);
            return Ok(Vec::new());
        }
        let goes_on = Rc::new(self.device.goes_on.try_clone().unwrap());
        self.io.readable(&goes_on).await?;
        let all = self.device.places.iter().flatten();
        let here = |place: &&MappedExtent| (from..from + len).contains(&place.offset);
        Ok(all.filter(here).copied().collect())
    }
    async fn read(&self, _: u64, data: Data) -> Result<(), Errno> {
        self.device.was_asked.store(true, Ordering::Relaxed);
        data.fill(0, data.len(), 0);
        Ok(())
    }
    async fn write(&self, _: u64, _: Bytes, _: Attributes) -> Result<(), Errno> {
        self.device.was_asked.store(true, Ordering::Relaxed);
        match self.device.write_fails {
            true => Err(Errno::IO),
            false => Ok(()),
        }
    }
    async fn flush(&self) -> Result<(), Errno> {
        match self.device.flush_fails {
            true => Err(Errno::IO),
            false => Ok(()),
        }
    }
    async fn discard(&self, _: u64, _: u64, _: Attributes) -> Result<(), Errno> {
        let goes_on = Rc::new(self.device.goes_on.try_clone().unwrap());
        self.io.readable(&goes_on).await
    }
    async fn resize(&self) -> Result<u64, Failure> {
        Ok(self.device.size)
    }
    async fn inactivate(&self) -> Result<(), Errno> {
        self.note()
    }
    async fn close(&self) -> Result<(), Errno> {
        self.note()
    }
}

/// Mapping of all of a disk of `sectors` sectors, for a generation of the kernel's table.
fn set(generation: u32, sectors: u64) -> MapOp {
    MapOp {
        op: MAP_SET,
        flags: MAP_READ | MAP_WRITE,
        generation,
        sectors,
        ..MapOp::default()
    }
}

fn flush() -> MapOp {
    MapOp {
        op: MAP_FLUSH,
        ..MapOp::default()
    }
}

fn recall() -> MapOp {
    MapOp {
        op: MAP_RECALL,
        sectors: u64::MAX,
        ..MapOp::default()
    }
}

/// Mappings that the kernel gets first.
fn given() -> Vec<MapOp> {
    vec![set(0, SECTORS), flush()]
}

/// Mappings that it gets when passthrough is allowed again after a revocation.
fn given_again() -> Vec<MapOp> {
    [given(), vec![recall(), set(1, SECTORS), flush()]].concat()
}

/// The kernel takes nothing before the start.
#[test]
fn a_device_is_given_to_the_kernel_when_it_is_started() {
    let kernel = FakeTap::new(4).unwrap();
    let process = MappedDevice::new(&kernel).serve(|_| ());
    assert_eq!(kernel.wait_for_map_ops(2), given());
    process.exit();
}

#[test]
fn of_a_disk_that_is_only_read_the_kernel_only_reads() {
    let kernel = FakeTap::new(4).unwrap();
    let device = MappedDevice::new(&kernel);
    let process = device.serve(|open| open.read_only = true);
    let read = MapOp {
        flags: MAP_READ,
        ..set(0, SECTORS)
    };
    assert_eq!(device.told(), [read]);
    process.exit();
}

#[test]
fn what_is_no_device_or_not_the_disks_alone_is_not_given() {
    type DirectCase = (bool, bool, u32);
    const CASES: [DirectCase; 3] = [(false, false, 1), (true, true, 1), (true, false, 2)];
    for (is_verbatim, shared, backings) in CASES {
        let kernel = FakeTap::new(4).unwrap();
        let device = MappedDevice {
            is_verbatim,
            ..MappedDevice::new(&kernel)
        };
        kernel.back(backings);
        let process = device.serve(move |open| open.shared = shared);
        assert_eq!(device.request(Op::Discard), ResponseStatus::Okay);
        assert_eq!(device.told(), [], "{is_verbatim} {shared} {backings}");
        process.exit();
        // A mapping that may exist is revoked, whichever process has sent it.
        let is_offered = is_verbatim && !shared;
        let taken = is_offered.then(recall);
        assert_eq!(kernel.map_ops(), Vec::from_iter(taken));
    }
}

/// The kernel may still use a mapping of the previous process.
#[test]
fn who_has_told_nothing_waits_for_the_kernel_too() {
    let kernel = FakeTap::new(4).unwrap();
    let mut process = MappedDevice::in_parts(&kernel).serve(|_| ());
    kernel.stick(true);
    thread::scope(|scope| {
        let pause = scope.spawn(|| process.ask(Request::Pause, None));
        kernel.wait_for_recalls(1);
        assert!(!pause.is_finished());
        kernel.stick(false);
        assert_eq!(pause.join().unwrap(), Ok(Reply::Done));
    });
    assert_eq!(kernel.map_ops(), [recall()]);
    process.exit();
}

#[test]
fn kernels_of_before_are_told_nothing() {
    let kernel = FakeTap::before_claims(4).unwrap();
    let device = MappedDevice::new(&kernel);
    let process = device.serve(|_| ());
    assert_eq!(device.told(), []);
    process.exit();
}

#[test]
fn a_kernel_that_fails_leaves_the_disk_to_the_process() {
    let kernel = FakeTap::new(4).unwrap();
    kernel.break_maps();
    let device = MappedDevice::new(&kernel);
    let mut process = device.serve(|_| ());
    assert_eq!(device.request(Op::Discard), ResponseStatus::Okay);
    assert_eq!(device.told(), []);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    process.exit();
}

#[test]
fn after_discards_it_is_told_once_more() {
    let kernel = FakeTap::new(8).unwrap();
    let device = MappedDevice::slow(&kernel);
    let process = device.serve(|_| ());
    assert_eq!(kernel.wait_for_map_ops(2), given());
    let discards: Vec<u16> = [Op::Discard, Op::Discard, Op::WriteZeroes, Op::Discard]
        .iter()
        .zip(0..)
        .map(|(op, place)| kernel.send_range(*op, place * 8, 8).unwrap())
        .collect();
    // Three discards wait; zeroes need no wait.
    kernel.wait_for(|info| info.delivered == 3);
    assert_eq!(device.told(), given(), "they are not answered");
    device.go_on();
    for tag in discards {
        assert_eq!(kernel.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
    }
    let twice = [given(), given()].concat();
    assert_eq!(device.told(), twice);
    process.exit();
}

#[test]
fn everything_is_taken_back_before_the_image_is_let_go_of() {
    for verb in [
        Request::Pause,
        Request::Inactivate,
        Request::Close,
        Request::Exit,
    ] {
        let kernel = FakeTap::new(4).unwrap();
        let device = MappedDevice::new(&kernel);
        let mut process = device.serve(|_| ());
        let given = kernel.wait_for_map_ops(2);
        let answer = process.ask(verb.clone(), None);
        assert!(answer.is_ok(), "{verb:?}: {answer:?}");
        let all = [given, vec![recall()]].concat();
        assert_eq!(*device.told.lock().unwrap(), all, "{verb:?}");
        assert_eq!(kernel.map_ops(), all, "{verb:?}");
        assert_eq!(kernel.refused_maps(), 0);
        match verb {
            Request::Exit => process.kill(),
            _ => process.exit(),
        }
    }
}

/// Mappings of [`MappedDevice::in_parts`].
fn told_in_parts(generation: u32, flags: u8) -> Vec<MapOp> {
    let set = |flags, sector, offset| MapOp {
        op: MAP_SET,
        flags,
        generation,
        sector,
        sectors: 8,
        offset,
        ..MapOp::default()
    };
    vec![set(flags, 0, 8192), set(MAP_READ, 16, 65536)]
}

/// The process sends no mapping before there is a place, and none because of a flush, which is the driver's work.
#[test]
fn an_image_in_parts_is_told_where_something_was_asked() {
    for read_only in [false, true] {
        let kernel = FakeTap::new(4).unwrap();
        let device = MappedDevice::in_parts(&kernel);
        let mut process = device.serve(move |open| open.read_only = read_only);
        assert_eq!(device.request(Op::Flush), ResponseStatus::Okay);
        assert_eq!(kernel.map_ops(), []);
        assert_eq!(device.request(Op::Read), ResponseStatus::Okay);
        let flags = MAP_READ | if read_only { 0 } else { MAP_WRITE };
        let told = told_in_parts(0, flags);
        assert_eq!(kernel.wait_for_map_ops(2), told);
        assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
        assert_eq!(kernel.map_ops(), [told, vec![recall()]].concat());
        process.exit();
    }
}

/// Places are mapped before the first request, and again after the kernel had to drop them.
#[test]
fn an_image_in_parts_is_told_ahead() {
    let kernel = FakeTap::new(4).unwrap();
    let device = MappedDevice {
        comes: false,
        ..MappedDevice::in_parts(&kernel)
    };
    let folder = tempfile::tempdir().unwrap();
    let mut process = with_nbd(&device, &folder);
    let told = told_in_parts(0, MAP_READ | MAP_WRITE);
    assert_eq!(kernel.wait_for_map_ops(2), told);
    let mut client = client(&folder);
    served(&mut client);
    drop(client);
    let again = told_in_parts(1, MAP_READ | MAP_WRITE);
    let all = [told, vec![recall()], again, vec![recall()]].concat();
    assert_eq!(kernel.wait_for_map_ops(5), all[..5]);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    assert_eq!(kernel.map_ops(), all);
    process.exit();
}

/// Returns the mappings of a disk with a place in each window of 2 MiB, `step` bytes apart, without requests; it waits
/// for `expected` of them.
fn told_ahead(windows: u64, step: u64, expected: usize) -> Vec<MapOp> {
    let kernel = FakeTap::new(4).unwrap();
    let place = |number| MappedExtent {
        offset: number << 21,
        len: 1 << 21,
        holder: Holder::Image,
        at: number * step,
        writable: true,
    };
    let device = MappedDevice {
        first_size: windows << 21,
        places: Some((0..windows).map(place).collect()),
        comes: false,
        ..MappedDevice::in_parts(&kernel)
    };
    let mut process = device.serve(|_| ());
    kernel.wait_for_map_ops(expected);
    assert_eq!(device.request(Op::Flush), ResponseStatus::Okay);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let mut told = kernel.map_ops();
    assert_eq!(told.pop(), Some(recall()));
    process.exit();
    told
}

/// The kernel has limited room for mappings, and a contiguous part takes no more of it than a short one.
#[test]
fn no_more_is_told_ahead_than_there_is_room_for() {
    assert_eq!(told_ahead(1024, 4 << 20, 512).len(), 512);
    assert_eq!(told_ahead(2560, 2 << 20, 2048).len(), 2048);
}

/// After a write, the driver may have allocated the clusters behind it: the kernel gets all of them that are writable.
/// A read does not allocate.
#[test]
fn behind_a_write_all_is_told_that_may_be_written() {
    for (op, expected) in [(Op::Write, vec![0, 1, 2, 3]), (Op::Read, vec![0])] {
        let kernel = FakeTap::new(4).unwrap();
        let place = |number: u64| MappedExtent {
            offset: number << 21,
            len: if number == 3 { 1 << 20 } else { 1 << 21 },
            holder: Holder::Image,
            at: number << 22,
            writable: true,
        };
        let device = MappedDevice {
            first_size: 6 << 21,
            places: Some((0..6).map(place).collect()),
            ..MappedDevice::in_parts(&kernel)
        };
        let mut process = device.serve(|_| ());
        assert_eq!(device.request(op), ResponseStatus::Okay);
        kernel.wait_for_map_ops(expected.len());
        assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
        let mut told = kernel.map_ops();
        assert_eq!(told.pop(), Some(recall()));
        let told: Vec<u64> = told.iter().map(|op| op.sector >> 12).collect();
        assert_eq!(told, expected, "{op:?}");
        process.exit();
    }
}

/// A backing image that the kernel does not have gets no mapping.
#[test]
fn what_is_below_the_image_and_what_is_nowhere_is_told_as_that() {
    let kernel = FakeTap::new(4).unwrap();
    let place = |offset, holder, at| MappedExtent {
        offset,
        len: 4096,
        holder,
        at,
        writable: false,
    };
    let device = MappedDevice {
        places: Some(vec![
            place(0, Holder::Below(2), 4096),
            place(4096, Holder::Below(3), 4096),
            place(8192, Holder::Nothing, 0),
        ]),
        ..MappedDevice::in_parts(&kernel)
    };
    kernel.back(1 | 1 << 2);
    let process = device.serve(|_| ());
    assert_eq!(device.request(Op::Read), ResponseStatus::Okay);
    let set = |flags, backing, sector, offset| MapOp {
        op: MAP_SET,
        flags,
        backing,
        sector,
        sectors: 8,
        offset,
        ..MapOp::default()
    };
    let told = [
        set(MAP_READ, 2, 0, 4096),
        set(MAP_READ | MAP_ZERO, MAP_NO_BACKING, 16, 0),
    ];
    assert_eq!(kernel.wait_for_map_ops(2), told);
    process.exit();
}

/// While another client uses the image it may change, so places that were found before are invalid.
#[test]
fn what_was_found_before_a_ban_is_not_told_after_it() {
    let kernel = FakeTap::new(4).unwrap();
    let device = MappedDevice {
        goes_on: Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap()),
        ..MappedDevice::in_parts(&kernel)
    };
    let folder = tempfile::tempdir().unwrap();
    let mut process = with_nbd(&device, &folder);
    assert_eq!(device.request(Op::Read), ResponseStatus::Okay);
    let mut client = client(&folder);
    served(&mut client);
    device.go_on();
    // Without the client the process would look up the places again, and map the present ones.
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    drop(client);
    assert_eq!(kernel.map_ops(), [recall()]);
    process.exit();
}

#[test]
fn the_disk_is_served_while_the_kernel_still_uses_the_image() {
    let kernel = FakeTap::new(4).unwrap();
    let device = MappedDevice::new(&kernel);
    let mut process = device.serve(|_| ());
    kernel.wait_for_map_ops(2);
    kernel.stick(true);
    thread::scope(|scope| {
        let pause = scope.spawn(|| process.ask(Request::Pause, None));
        kernel.wait_for_recalls(1);
        // A change of the mappings during the pause sends nothing to the kernel.
        assert_eq!(device.request(Op::Discard), ResponseStatus::Okay);
        assert_eq!(device.told(), given());
        assert!(!pause.is_finished() && device.told.lock().unwrap().is_empty());
        kernel.stick(false);
        assert_eq!(pause.join().unwrap(), Ok(Reply::Done));
    });
    assert_eq!(kernel.map_ops(), [given(), vec![recall()]].concat());
    process.exit();
}

/// A process that serves NBD clients at this socket.
fn with_nbd(device: &MappedDevice, folder: &tempfile::TempDir) -> Process {
    let listener = UnixListener::bind(folder.path().join("nbd")).unwrap();
    let mut process = device.serve(|_| ());
    if device.is_verbatim {
        device.kernel.wait_for_map_ops(2);
    }
    let nbd = Request::Nbd {
        export: String::new(),
    };
    assert_eq!(process.ask_with(nbd, listener.as_fd()), Ok(Reply::Done));
    process
}

fn client(folder: &tempfile::TempDir) -> UnixStream {
    UnixStream::connect(folder.path().join("nbd")).unwrap()
}

/// Waits until a client is served.
fn served(client: &mut UnixStream) {
    client.read_exact(&mut [0; 18]).unwrap();
}

#[test]
fn the_kernel_does_nothing_while_there_are_nbd_clients() {
    let (kernel, folder) = (FakeTap::new(4).unwrap(), tempfile::tempdir().unwrap());
    let device = MappedDevice::new(&kernel);
    let process = with_nbd(&device, &folder);
    assert_eq!(device.told(), given(), "nobody is there yet");
    let (mut first, mut second) = (client(&folder), client(&folder));
    served(&mut first);
    served(&mut second);
    let taken = [given(), vec![recall()]].concat();
    assert_eq!(device.told(), taken);
    assert_eq!(device.request(Op::Discard), ResponseStatus::Okay);
    drop(first);
    assert_eq!(device.told(), taken, "there is another one");
    drop(second);
    assert_eq!(kernel.wait_for_map_ops(5), given_again());
    assert_eq!(kernel.refused_maps(), 0);
    process.exit();
}

#[test]
fn a_client_is_served_when_the_kernel_has_ended_its_own_io() {
    let (kernel, folder) = (FakeTap::new(4).unwrap(), tempfile::tempdir().unwrap());
    let device = MappedDevice::new(&kernel);
    let mut process = with_nbd(&device, &folder);
    kernel.stick(true);
    let mut client = client(&folder);
    kernel.wait_for_recalls(1);
    client.set_nonblocking(true).unwrap();
    let early = client.read(&mut [0; 18]).unwrap_err();
    assert_eq!(early.kind(), std::io::ErrorKind::WouldBlock);
    client.set_nonblocking(false).unwrap();
    // A pause waits for the same, once.
    thread::scope(|scope| {
        let pause = scope.spawn(|| process.ask(Request::Pause, None));
        assert_eq!(device.told(), given());
        kernel.stick(false);
        assert_eq!(pause.join().unwrap(), Ok(Reply::Done));
    });
    served(&mut client);
    drop(client);
    process.exit();
    assert_eq!(kernel.map_ops(), [given(), vec![recall()]].concat());
}

#[test]
fn another_size_is_told() {
    for (size, more) in [
        (2 * SIZE, vec![set(0, 2 * SECTORS), flush()]),
        (SIZE / 2, vec![recall(), set(1, SECTORS / 2), flush()]),
        (SIZE, vec![]),
    ] {
        let kernel = FakeTap::new(4).unwrap();
        let device = MappedDevice {
            size,
            ..MappedDevice::new(&kernel)
        };
        let mut process = device.serve(|open| open.may_shrink = true);
        kernel.wait_for_map_ops(2);
        let resized = process.ask(Request::Resize, None);
        assert!(matches!(resized, Ok(Reply::Disk(_))), "{resized:?}");
        assert_eq!(device.told(), [given(), more].concat(), "{size}");
        process.exit();
    }
}

#[test]
fn a_guest_that_is_not_suspended_keeps_the_kernel() {
    let kernel = FakeTap::new(16).unwrap();
    let device = MappedDevice::new(&kernel);
    let mut process = device.serve(|_| ());
    kernel.wait_for_map_ops(2);
    kernel.insist(true);
    let tags = [0, 8, 16, 24].map(|at| kernel.send(Op::Read, at, &[0; 512], false).unwrap());
    let refused = process.ask(Request::Inactivate, None).unwrap_err();
    kernel.insist(false);
    assert_eq!(refused.code, Code::State, "{refused}");
    assert_eq!(process.status().state, State::Running);
    assert_eq!(kernel.wait_for_map_ops(5), given_again());
    for tag in tags {
        assert_eq!(kernel.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
    }
    process.exit();
}

/// The process's own request has failed; one of the kernel would come back to the process and fail again.
#[test]
fn a_disk_that_stops_is_not_served_by_the_kernel_either() {
    let kernel = FakeTap::new(4).unwrap();
    let device = MappedDevice {
        write_fails: true,
        ..MappedDevice::new(&kernel)
    };
    let process = device.serve(|open| open.on_error = OnError::Stop);
    kernel.wait_for_map_ops(2);
    kernel.send(Op::Write, 0, &[1; 512], false).unwrap();
    let told = kernel.wait_for_map_ops(3);
    assert_eq!(told, [given(), vec![recall()]].concat());
    process.exit();
    assert_eq!(kernel.map_ops(), told);
}

/// The kernel knows no limits, neither the disk's own nor those of its group.
#[test]
fn with_a_limit_the_kernel_does_nothing() {
    let limits = control::Limits {
        requests: 100,
        ..control::Limits::default()
    };
    let pace = control::GroupRate::of(&limits);
    let share = control::RateShare {
        pace,
        until: std::time::Duration::ZERO,
        after: pace,
        from: std::time::Duration::ZERO,
        burst_s: 1,
    };
    kernel_does_nothing_with(Rules {
        limits,
        ..Rules::default()
    });
    kernel_does_nothing_with(Rules {
        share: Some(share),
        ..Rules::default()
    });
}

fn kernel_does_nothing_with(rules: Rules) {
    let kernel = FakeTap::new(4).unwrap();
    let device = MappedDevice::new(&kernel);
    let limited = Request::Set(rules);
    let mut process = device.serve(|_| ());
    kernel.wait_for_map_ops(2);
    assert_eq!(process.ask(limited, None), Ok(Reply::Done));
    let taken = [given(), vec![recall()]].concat();
    assert_eq!(device.request(Op::Discard), ResponseStatus::Okay);
    assert_eq!(device.told(), taken);
    let unlimited = Request::Set(Rules::default());
    assert_eq!(process.ask(unlimited, None), Ok(Reply::Done));
    assert_eq!(device.request(Op::Read), ResponseStatus::Okay);
    assert_eq!(kernel.wait_for_map_ops(5), given_again());
    process.exit();
    // Mappings of the previous process are revoked before a request is served.
    let kernel = FakeTap::new(4).unwrap();
    let device = MappedDevice::new(&kernel);
    let process = device.serve(move |open| (open.limits, open.share) = (rules.limits, rules.share));
    assert_eq!(device.request(Op::Discard), ResponseStatus::Okay);
    assert_eq!(device.told(), [recall()]);
    process.exit();
}

/// The process reports lost writes with the guest's next flush; the kernel would not.
#[test]
fn who_has_lost_something_does_not_leave_flushes_to_the_kernel() {
    let kernel = FakeTap::new(4).unwrap();
    let device = MappedDevice {
        flush_fails: true,
        ..MappedDevice::new(&kernel)
    };
    let process = device.serve(|_| ());
    kernel.wait_for_map_ops(2);
    assert_eq!(device.request(Op::Flush), ResponseStatus::Error);
    assert_eq!(device.request(Op::Discard), ResponseStatus::Okay);
    assert_eq!(device.told(), [given(), vec![recall()]].concat());
    process.exit();
}
