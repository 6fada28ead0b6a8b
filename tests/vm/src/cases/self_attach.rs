// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks of dom0 itself, which come and go without a toolstack.

use crate::{sh, xs};
use anyhow::{Context as _, Result};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

/// Time in which many disks must come or go.
const LIMIT: Duration = Duration::from_secs(120);

/// The backend's device of a disk.
pub(super) fn sysfs(id: &str) -> String {
    format!("/sys/bus/xen-backend/devices/vbd-0-{id}")
}

/// Writes to the begin of a disk that is connected.
pub(super) fn write(id: &str, mebibytes: u32) -> Result<()> {
    let name = sh::shell(&format!("ls /sys/bus/xen/devices/vbd-{id}/block"))?;
    let name = name.trim();
    sh::shell(&format!(
        "dd if=/dev/zero of=/dev/{name} bs=1M count={mebibytes} oflag=direct status=none"
    ))
    .map(drop)
}

/// Disks of dom0, made by their keys alone: xl would take longer than all else.
pub(super) struct OwnDisks(pub(super) Vec<String>);

impl OwnDisks {
    /// Makes `count` disks of a device, without waiting.
    pub(super) fn connect(device: &str, count: u32) -> Result<OwnDisks> {
        let number = fs::metadata(device)?.rdev();
        let (major, minor) = (
            (number >> 8) & 0xfff,
            (number & 0xff) | (number >> 12 & 0xfff00),
        );
        let mut disks = OwnDisks(Vec::new());
        for disk in 0..count {
            let id = (1u32 << 28 | (16 + disk) << 8).to_string();
            let back = format!("/local/domain/0/backend/vbd/0/{id}");
            let front = format!("/local/domain/0/device/vbd/{id}");
            let pairs = [
                (&front, "backend", back.clone()),
                (&front, "backend-id", "0".into()),
                (&front, "virtual-device", id.clone()),
                (&front, "device-type", "disk".into()),
                (&front, "state", "1".into()),
                (&back, "frontend", front.clone()),
                (&back, "frontend-id", "0".into()),
                (&back, "online", "1".into()),
                (&back, "mode", "w".into()),
                (&back, "dev", format!("many{disk}")),
                (&back, "physical-device", format!("{major:x}:{minor:x}")),
                (&back, "state", "1".into()),
            ];
            let keys: Vec<String> = pairs
                .iter()
                .map(|(dir, key, _)| format!("{dir}/{key}"))
                .collect();
            let all = keys.iter().zip(&pairs);
            let all: Vec<(&str, &str)> = all
                .map(|(key, (_, _, value))| (&key[..], &value[..]))
                .collect();
            disks.0.push(id);
            xs::write(&all)?;
        }
        Ok(disks)
    }

    /// Waits until both sides of all disks are in this state.
    pub(super) fn wait(&self, state: &str) -> Result<()> {
        for id in &self.0 {
            for dir in ["backend/vbd/0", "device/vbd"] {
                let path = format!("/local/domain/0/{dir}/{id}/state");
                xs::wait_value(&path, state, LIMIT).with_context(|| {
                    let error = format!("/local/domain/0/error/backend/vbd/0/{id}/error");
                    format!("{:?}", xs::read(&error))
                })?;
            }
        }
        Ok(())
    }

    /// Takes all disks away in order.
    pub(super) fn disconnect(&self) -> Result<()> {
        for id in &self.0 {
            let back = format!("/local/domain/0/backend/vbd/0/{id}");
            let (online, state) = (format!("{back}/online"), format!("{back}/state"));
            if xs::read(&state)?.is_some() {
                xs::write(&[(&online, "0"), (&state, "5")])?;
            }
        }
        for id in &self.0 {
            for dir in ["backend/vbd/0", "device/vbd"] {
                let path = format!("/local/domain/0/{dir}/{id}");
                sh::wait_for(&format!("the end of {path}"), LIMIT, || {
                    let state = xs::read(&format!("{path}/state"))?;
                    Ok(state.is_none_or(|state| state == "6"))
                })?;
            }
        }
        self.forget()
    }

    /// Removes the keys of all disks.
    pub(super) fn forget(&self) -> Result<()> {
        for id in &self.0 {
            xs::remove(&format!("/local/domain/0/device/vbd/{id}"))?;
            xs::remove(&format!("/local/domain/0/backend/vbd/0/{id}"))?;
            xs::remove(&format!("/local/domain/0/error/backend/vbd/0/{id}"))?;
            let devices = [sysfs(id), format!("/sys/bus/xen/devices/vbd-{id}")];
            sh::wait_for("the removal of both devices", LIMIT, || {
                Ok(devices.iter().all(|device| fs::metadata(device).is_err()))
            })?;
        }
        Ok(())
    }
}
