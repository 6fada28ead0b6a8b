// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images over images of any format, found by the names in their headers.

use crate::common::tools::folder;
use control::Failure;
use diskio::{Bytes, Data, File, Io, Runtime};
use drivers::{Attributes, Disk, Raw};
use formats::{open_chain, qcow, qcow2, vhd, vmdk, Below, Files, ImageFormat, Options, LAYERS};
use std::cell::RefCell;
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};

/// Bytes of all disks; each layer writes one piece, from the bottom up.
const SIZE: u64 = 4 << 20;
const PIECE: u64 = 256 << 10;

/// Files of a folder, and a log of the files that were opened.
struct ChainFolder {
    io: Io,
    asked: RefCell<Vec<(PathBuf, bool)>>,
    /// A file that is refused.
    refused: Option<PathBuf>,
}

impl ChainFolder {
    fn new(io: &Io) -> Self {
        Self {
            io: io.clone(),
            asked: RefCell::default(),
            refused: None,
        }
    }

    fn open(&self, path: &Path, writable: bool) -> File {
        crate::common::tools::file(&self.io, path, writable)
    }

    /// Returns the names of the opened files, with `w` before those that were opened for writing.
    fn names(&self) -> Vec<String> {
        let asked = self.asked.borrow();
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_string();
        let spelled = asked.iter().map(|(path, writable)| match writable {
            true => format!("w {}", name(path)),
            false => name(path),
        });
        spelled.collect()
    }
}

impl Files<File> for ChainFolder {
    async fn open(&self, path: &Path, writable: bool) -> Result<File, Failure> {
        self.asked.borrow_mut().push((path.to_path_buf(), writable));
        if self.refused.as_deref() == Some(path) || !path.exists() {
            let path = path.display();
            return Err(Failure::invalid(format!("{path} is not given out")));
        }
        Ok(self.open(path, writable))
    }

    fn raw(&self, file: File) -> Disk {
        Disk::new(Raw::new(file, false))
    }
}

/// Runs a test with files in a folder of its own.
fn run<W: Future<Output = ()> + 'static>(test: impl FnOnce(PathBuf, Io) -> W) {
    let (folder, runtime) = (folder(), Runtime::new());
    let work = test(folder.path().to_path_buf(), runtime.io.clone());
    runtime.block_on(work).unwrap();
}

fn vhd(kind: vhd::VhdKind, id: u8, parent: Option<(&str, [u8; 16])>) -> vhd::VhdCreate {
    vhd::VhdCreate {
        kind,
        size: SIZE,
        id: [id; 16],
        parent: parent.map(|(path, id)| vhd::ParentOf {
            path: path.into(),
            id,
        }),
        reserve: 0,
    }
}

fn plan(parent: Option<(&str, Option<&str>)>) -> qcow2::Qcow2Create {
    qcow2::Qcow2Create {
        backing: parent.map(|(name, format)| qcow2::BackingImage {
            name: name.into(),
            format: format.map(str::to_string),
        }),
        ..qcow2::Qcow2Create::new(SIZE)
    }
}

/// Writes piece `number` of an image, and closes the image.
async fn put(files: &ChainFolder, kind: ImageFormat, path: &Path, options: Options, number: u64) {
    let image = files.open(path, true);
    let disk = open_chain(kind, image, path, options, files).await.unwrap();
    assert_eq!(disk.activate().await.unwrap().size, SIZE);
    // CAST: small.
    let bytes = vec![number as u8 + 1; PIECE as usize];
    let bytes = Bytes::copied(&bytes).unwrap();
    disk.write(number * PIECE, bytes, Attributes::default())
        .await
        .unwrap();
    disk.close().await.unwrap();
}

/// Returns the first byte of each piece of a disk; all bytes of a piece must be equal.
async fn pieces(disk: &Disk) -> Vec<u8> {
    let data = Data::zeroed(SIZE as usize).unwrap();
    disk.read(0, data.clone()).await.unwrap();
    let all = data.to_vec();
    let pieces = all.chunks(PIECE as usize);
    pieces
        .map(|piece| {
            assert!(piece.iter().all(|byte| *byte == piece[0]));
            piece[0]
        })
        .collect()
}

fn first(count: u8) -> Vec<u8> {
    let mut all: Vec<u8> = (1..=count).collect();
    all.resize((SIZE / PIECE) as usize, 0);
    all
}

/// raw, VHD, VMDK in two files... each over another, and all is read from the top.
#[test]
fn formats_lie_over_each_other() {
    run(|folder, io| async move {
        let files = ChainFolder::new(&io);
        let at = |name: &str| folder.join(name);
        let new = |name: &str| files.open(&at(name), true);
        let mut raw = vec![1; PIECE as usize];
        raw.resize(SIZE as usize, 0);
        fs::write(at("a.raw"), raw).unwrap();
        // A raw parent, which tapdisk says by an identity of zeroes.
        let what = vhd(vhd::VhdKind::Differencing, 1, Some(("a.raw", [0; 16])));
        vhd::create(&new("b.vhd"), &what).await.unwrap();
        put(&files, ImageFormat::Vhd, &at("b.vhd"), Options::new("b"), 1).await;
        let what = vhd(vhd::VhdKind::Differencing, 2, Some(("b.vhd", [1; 16])));
        vhd::create(&new("c.vhd"), &what).await.unwrap();
        put(&files, ImageFormat::Vhd, &at("c.vhd"), Options::new("c"), 2).await;
        // QEMU calls VHD vpc.
        qcow2::create(&new("d.qcow2"), &plan(Some(("c.vhd", Some("vpc")))))
            .await
            .unwrap();
        put(
            &files,
            ImageFormat::Qcow2,
            &at("d.qcow2"),
            Options::new("d"),
            3,
        )
        .await;
        let what = qcow::QcowCreate {
            size: SIZE,
            parent: Some("d.qcow2".into()),
        };
        qcow::create(&new("e.qcow"), &what).await.unwrap();
        let over = Options {
            parents: Some(Below::Format(ImageFormat::Qcow2)),
            ..Options::new("e")
        };
        put(&files, ImageFormat::Qcow, &at("e.qcow"), over, 4).await;
        let mut what = plan(Some(("e.qcow", Some("qcow"))));
        what.data_file = Some(("f.data".into(), false));
        fs::write(at("f.data"), []).unwrap();
        qcow2::create(&new("f.qcow2"), &what).await.unwrap();
        let options = Options {
            parents: Some(Below::Format(ImageFormat::Qcow2)),
            ..Options::new("f")
        };
        let before = files.names().len();
        put(
            &files,
            ImageFormat::Qcow2,
            &at("f.qcow2"),
            options.clone(),
            5,
        )
        .await;
        let asked = files.names().split_off(before);
        let below = ["e.qcow", "d.qcow2", "c.vhd", "b.vhd", "a.raw"];
        // Only the files of the top image may be opened for writing.
        assert_eq!(asked, [&["w f.data"][..], &below].concat());
        let options = Options {
            writable: false,
            ..options
        };
        let before = files.names().len();
        let (image, path) = (files.open(&at("f.qcow2"), false), at("f.qcow2"));
        let disk = open_chain(ImageFormat::Qcow2, image, &path, options, &files);
        let disk = disk.await.unwrap();
        assert_eq!(files.names()[before], "f.data");
        disk.activate().await.unwrap();
        assert_eq!(pieces(&disk).await, first(6));
        disk.close().await.unwrap();
    });
}

#[test]
fn vmdk_in_several_files_lies_below_another() {
    run(|folder, io| async move {
        let files = ChainFolder::new(&io);
        let at = |name: &str| folder.join(name);
        let create = |name: &str, form, parent: Option<&str>| vmdk::VmdkCreate {
            form,
            size: SIZE,
            name: name.into(),
            parent: parent.map(|name| (name.to_string(), 7)),
            cid: 7,
        };
        let what = create("a.vmdk", vmdk::Form::MonolithicFlat, None);
        let names: Vec<String> = vmdk::plan(&what)
            .unwrap()
            .into_iter()
            .map(|new| new.name)
            .collect();
        let extents: Vec<File> = names
            .iter()
            .map(|name| files.open(&at(name), true))
            .collect();
        vmdk::create(&files.open(&at("a.vmdk"), true), &extents, &what)
            .await
            .unwrap();
        let what = create("b.vmdk", vmdk::Form::MonolithicSparse, Some("a.vmdk"));
        vmdk::create(&files.open(&at("b.vmdk"), true), &[], &what)
            .await
            .unwrap();
        put(
            &files,
            ImageFormat::Vmdk,
            &at("b.vmdk"),
            Options::new("b"),
            0,
        )
        .await;
        let asked: Vec<&str> = std::iter::once("a.vmdk")
            .chain(names.iter().map(String::as_str))
            .collect();
        assert_eq!(files.names(), asked);
        // A parent whose content has changed has another identity.
        put(
            &files,
            ImageFormat::Vmdk,
            &at("a.vmdk"),
            Options::new("a"),
            1,
        )
        .await;
        let (image, path) = (files.open(&at("b.vmdk"), true), at("b.vmdk"));
        let opened = open_chain(ImageFormat::Vmdk, image, &path, Options::new("b"), &files).await;
        let said = opened.unwrap_err().message;
        assert!(
            said.contains("b.vmdk") && said.contains("not the parent"),
            "{said}"
        );
    });
}

/// A guest may have stored a header on a raw disk: the child's type for it still holds.
#[test]
fn raw_parent_is_never_looked_into() {
    run(|folder, io| async move {
        let files = ChainFolder::new(&io);
        let at = |name: &str| folder.join(name);
        // The image names a file that the guest would like to read.
        let secret = plan(Some(("/etc/shadow", Some("raw"))));
        qcow2::create(&files.open(&at("a.raw"), true), &secret)
            .await
            .unwrap();
        let raw = fs::read(at("a.raw")).unwrap();
        for (name, format) in [("b", Some("raw")), ("c", None)] {
            qcow2::create(&files.open(&at(name), true), &plan(Some(("a.raw", format))))
                .await
                .unwrap();
            let open = async |options| {
                let (image, path) = (files.open(&at(name), true), at(name));
                open_chain(ImageFormat::Qcow2, image, &path, options, &files).await
            };
            let disk = match format {
                Some(_) => open(Options::new("b")).await.unwrap(),
                None => {
                    let said = open(Options::new("c")).await.unwrap_err().message;
                    assert!(said.contains("not guessed"), "{said}");
                    let options = Options {
                        parents: Some(Below::Raw),
                        ..Options::new("c")
                    };
                    open(options).await.unwrap()
                }
            };
            disk.activate().await.unwrap();
            let data = Data::zeroed(raw.len()).unwrap();
            disk.read(0, data.clone()).await.unwrap();
            assert!(data.to_vec() == raw);
        }
        assert!(files.names().iter().all(|name| name == "a.raw"));
    });
}

/// Of a VHD's names for its parent, the one counts that leads to the right image.
#[test]
fn parent_is_the_one_that_is_meant() {
    run(|folder, io| async move {
        let mut files = ChainFolder::new(&io);
        let at = |name: &str| folder.join(name);
        let other = folder.join("other");
        fs::create_dir(&other).unwrap();
        for (path, id) in [(at("a.vhd"), 1), (other.join("a.vhd"), 2)] {
            let what = vhd(vhd::VhdKind::Dynamic, id, None);
            vhd::create(&files.open(&path, true), &what).await.unwrap();
        }
        let what = vhd(
            vhd::VhdKind::Differencing,
            3,
            Some(("other/a.vhd", [1; 16])),
        );
        vhd::create(&files.open(&at("b.vhd"), true), &what)
            .await
            .unwrap();
        // The locators lead to another disk, the name in the header to the one that is meant.
        let open = async |files: &ChainFolder| {
            let image = files.open(&at("b.vhd"), true);
            open_chain(
                ImageFormat::Vhd,
                image,
                &at("b.vhd"),
                Options::new("b"),
                files,
            )
            .await
        };
        let disk = open(&files).await.unwrap();
        disk.activate().await.unwrap();
        files.refused = Some(at("a.vhd"));
        let said = open(&files).await.unwrap_err().message;
        for part in ["b.vhd", "not the parent", "is not given out"] {
            assert!(said.contains(part), "{said}");
        }
    });
}

#[test]
fn long_chain_is_refused_and_so_is_one_without_end() {
    run(|folder, io| async move {
        let files = ChainFolder::new(&io);
        let at = |number: usize| folder.join(number.to_string());
        for number in 0..=LAYERS {
            let below = number.checked_sub(1).map(|below| below.to_string());
            let below = below.as_deref().map(|below| (below, Some("qcow2")));
            qcow2::create(&files.open(&at(number), true), &plan(below))
                .await
                .unwrap();
        }
        let open = async |number: usize| {
            let image = files.open(&at(number), true);
            open_chain(
                ImageFormat::Qcow2,
                image,
                &at(number),
                Options::new("top"),
                &files,
            )
            .await
        };
        put(&files, ImageFormat::Qcow2, &at(0), Options::new("a"), 0).await;
        let disk = open(LAYERS - 1).await.unwrap();
        disk.activate().await.unwrap();
        assert_eq!(pieces(&disk).await, first(1));
        disk.close().await.unwrap();
        let said = open(LAYERS).await.unwrap_err().message;
        assert!(said.contains("64 images"), "{said}");
        // This image names itself as its backing image.
        let own = plan(Some(("0", Some("qcow2"))));
        fs::write(at(0), []).unwrap();
        qcow2::create(&files.open(&at(0), true), &own)
            .await
            .unwrap();
        let said = open(0).await.unwrap_err().message;
        assert!(said.contains("64 images"), "{said}");
    });
}

#[test]
fn what_cannot_be_followed_is_named() {
    run(|folder, io| async move {
        let files = ChainFolder::new(&io);
        let path = folder.join("a.qcow2");
        for (name, format, part) in [
            ("json:{}", Some("raw"), "only files"),
            ("nbd://host/disk", Some("raw"), "only files"),
            ("b.img", Some("bochs"), "bochs"),
            ("b.img", Some("raw"), "b.img is not given out"),
        ] {
            fs::write(&path, []).unwrap();
            let plan = plan(Some((name, format)));
            qcow2::create(&files.open(&path, true), &plan)
                .await
                .unwrap();
            let image = files.open(&path, true);
            let opened = open_chain(ImageFormat::Qcow2, image, &path, Options::new("a"), &files);
            let said = opened.await.unwrap_err().message;
            assert!(said.contains("a.qcow2") && said.contains(part), "{said}");
        }
    });
}
