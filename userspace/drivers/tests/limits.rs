// SPDX-License-Identifier: MIT OR Apache-2.0
//! A driver gets no larger request than its limits allow.

use control::Failure;
use diskio::Runtime;
use drivers::{Attributes, Bytes, Data, Disk, DiskInfo, Driver, DriverLimits, Errno, Fence};
use std::cell::RefCell;
use std::rc::Rc;

const SIZE: u64 = 64 << 10;
const LIMITS: DriverLimits = DriverLimits {
    transfer: 5000,
    zeroes: 9000,
    align: 4096,
};

/// Memory that takes small requests only, and writes down where they were.
#[derive(Clone, Default)]
struct Small {
    bytes: Rc<RefCell<Vec<u8>>>,
    calls: Rc<RefCell<Vec<(u64, u64)>>>,
    flushes: Rc<RefCell<usize>>,
}

impl Small {
    fn call(&self, offset: u64, len: u64, limit: u64) -> Result<std::ops::Range<usize>, Errno> {
        self.calls.borrow_mut().push((offset, len));
        match len <= limit {
            true => Ok(offset as usize..(offset + len) as usize),
            false => Err(Errno::TOOBIG),
        }
    }
}

impl Driver for Small {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        self.bytes.borrow_mut().resize(SIZE as usize, 0);
        Ok(DiskInfo {
            size: SIZE,
            logical_block: 512,
            physical_block: 512,
            discard: Some(512),
            write_cache: true,
            fua: false,
            limits: LIMITS,
        })
    }

    fn fence(&self) -> Fence {
        Fence::Local
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let range = self.call(offset, data.len() as u64, LIMITS.transfer)?;
        data.write(0, &self.bytes.borrow()[range]);
        Ok(())
    }

    async fn write(&self, offset: u64, data: Bytes, _: Attributes) -> Result<(), Errno> {
        let range = self.call(offset, data.len() as u64, LIMITS.transfer)?;
        data.read(0, &mut self.bytes.borrow_mut()[range]);
        Ok(())
    }

    async fn discard(&self, offset: u64, len: u64, _: Attributes) -> Result<(), Errno> {
        let range = self.call(offset, len, LIMITS.zeroes)?;
        self.bytes.borrow_mut()[range].fill(0);
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64, how: Attributes) -> Result<(), Errno> {
        self.discard(offset, len, how).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        *self.flushes.borrow_mut() += 1;
        Ok(())
    }
}

#[test]
fn large_requests_come_in_pieces_that_end_where_blocks_do() {
    let driver = Small::default();
    let disk = Disk::new(driver.clone());
    let calls = driver.calls.clone();
    let runtime = Runtime::new();
    let done = runtime.block_on(async move {
        disk.activate().await.unwrap();
        let how = Attributes {
            fua: true,
            ..Attributes::default()
        };
        let content: Vec<u8> = (0..20_480).map(|at| (at / 512) as u8 + 1).collect();
        disk.write(512, Bytes::copied(&content)?, how).await?;
        let expected = [
            (512, 3584),
            (4096, 4096),
            (8192, 4096),
            (12288, 4096),
            (16384, 4608),
        ];
        assert_eq!(calls.take(), expected);
        let data = Data::zeroed(20_480)?;
        disk.read(512, data.clone()).await?;
        assert_eq!(calls.take(), expected);
        assert_eq!(data.to_vec(), content);
        disk.write_zeroes(1024, 18_432, how).await?;
        let expected = [(1024, 7168), (8192, 8192), (16384, 3072)];
        assert_eq!(calls.take(), expected);
        disk.discard(1024, 18_432, Attributes::default()).await?;
        assert_eq!(calls.take(), expected);
        disk.read(512, data.clone()).await?;
        let bytes = data.to_vec();
        assert_eq!(
            (bytes[511], bytes[512], bytes[18_943], bytes[18_944]),
            (1, 0, 0, 38)
        );
        Ok::<_, Errno>(())
    });
    done.unwrap().unwrap();
    // One flush for each durable request, not one for each piece.
    assert_eq!(*driver.flushes.borrow(), 2);
}
