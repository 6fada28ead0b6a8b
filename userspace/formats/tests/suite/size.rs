// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory of a request that is under way. Each request is a block of the heap, and a guest has 32 or more at once. If
//! they are large, the heap grows beyond the part that the C library keeps, so the library gives memory back and takes
//! it again for each request, and these system calls and page faults cost more than the request.

use crate::common::tools::{file, folder};
use diskio::{Bytes, Data, File, Runtime};
use drivers::{Attributes, Driver};
use formats::{luks, qcow, qcow2, vhd, vhdx, vmdk, ImageParts, Options};

/// Bytes of a request that is executed where its place is already.
const MOST: usize = 2560;

/// Returns the bytes that a driver needs for a read and for a write.
fn sizes(driver: &impl Driver) -> [usize; 2] {
    let (data, bytes) = (Data::zeroed(512).unwrap(), Bytes::copied(&[0; 512]));
    let read = driver.read(0, data);
    let write = driver.write(0, bytes.unwrap(), Attributes::default());
    [std::mem::size_of_val(&read), std::mem::size_of_val(&write)]
}

#[test]
fn requests_are_small() {
    let (runtime, folder) = (Runtime::new(), folder());
    let image = file(&runtime.io, &folder.path().join("a.img"), true);
    let new = |name: &str| {
        (
            image.clone(),
            ImageParts::<File>::default(),
            Options::new(name),
        )
    };
    let (file, parts, options) = new("qcow2");
    let qcow2 = sizes(&qcow2::Qcow2::new(file, parts, options));
    let (file, parts, options) = new("qcow");
    let qcow = sizes(&qcow::Qcow::new(file, parts, options));
    let (file, parts, options) = new("vhd");
    let vhd = sizes(&vhd::Vhd::new(file, parts, options));
    let (file, parts, options) = new("vhdx");
    let [vhdx, _] = sizes(&vhdx::Vhdx::new(file, parts, options));
    let (file, parts, options) = new("vmdk");
    let vmdk = sizes(&vmdk::Vmdk::new(file, parts, options));
    let (file, parts, options) = new("luks");
    let luks = sizes(&luks::Luks::new(file, parts, options));
    let all = [
        ("qcow2", qcow2),
        ("qcow", qcow),
        ("vhd", vhd),
        ("vhdx", [vhdx, 0]),
        ("vmdk", vmdk),
        ("luks", luks),
    ];
    for (name, [read, write]) in all {
        assert!(
            read <= MOST && write <= MOST,
            "{name}: a read takes {read} bytes, a write {write}"
        );
    }
}
