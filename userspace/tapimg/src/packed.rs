// SPDX-License-Identifier: MIT OR Apache-2.0
//! Option `--compress` of `tapimg convert`: whole clusters, compressed by the helpers several at a time, and stored in their
//! order.

use crate::cli::{CompressionMethod, Convert};
use crate::convert::Copy;
use crate::create::{make, of_vmdk};
use crate::dirty_runs::{difference, is_zero};
use crate::image_spec::ImageSpec;
use crate::open::{failed, ImageOpener};
use crate::progress::Progress;
use crate::signals::Stop;
use crate::walk;
use control::Failure;
use diskio::{Bytes, Data, Errno, File};
use drivers::{Attributes, Driver};
use formats::qcow2::{self, Compression, Qcow2};
use formats::vmdk::{self, VmdkStream};
use formats::{Below, ImageFormat, ImageParts, Options};
use futures::stream::{self, TryStreamExt};
use std::ops::Range;

/// Bytes that are compressed at the same time.
const UNDER_WAY: u64 = 8 << 20;

/// A cluster of the new image.
enum PackedCluster {
    /// The new image needs nothing there: it is zeroes, or as the backing image has it.
    Nothing,
    /// Zeroes of that many bytes, where the backing image has something else.
    Zeroes(u64),
    /// Compressed bytes, which are fewer.
    Packed(Vec<u8>),
    /// Bytes that compression does not make fewer.
    Plain(Data),
}

/// An image that gets compressed clusters.
enum PackedTarget {
    Qcow2(Qcow2<File>),
    Vmdk(VmdkStream<File>),
}

/// Refuses a compression that an image cannot have, before anything is touched.
pub(crate) fn check(args: &Convert) -> Result<(), Failure> {
    let Some(how) = args.compress else {
        return Ok(());
    };
    let to = &args.to;
    let refuse = |why: &str| Err(Failure::invalid(format!("{to}: {why}")));
    match to.kind {
        _ if to.is_sealed() => refuse("an encrypted image is not compressed: leave --compress or key= out"),
        _ if args.damaged => {
            refuse("the remains of a damaged image are copied first, and compressed in a second step: leave --compress out")
        }
        Below::Format(ImageFormat::Qcow2) => Ok(()),
        Below::Format(ImageFormat::Vmdk) if how == CompressionMethod::Zstd => {
            refuse("a VMDK is compressed with zlib only: say --compress")
        }
        Below::Format(ImageFormat::Vmdk) if args.layout.parent.is_some() => {
            refuse("a compressed VMDK has no parent: leave --compress or --parent out")
        }
        Below::Format(ImageFormat::Vmdk) => Ok(()),
        _ => refuse("only qcow2 images and VMDKs are compressed: leave --compress out, or use qcow2"),
    }
}

/// Copies into a new, compressed image in `file`.
pub(crate) async fn copy(
    opener: &ImageOpener,
    args: &Convert,
    how: CompressionMethod,
    from: &Copy<'_>,
    file: &File,
    stop: &Stop,
    progress: &Progress,
) -> Result<(), Failure> {
    let (to, how) = (&args.to, method(how));
    let unit = match to.kind {
        Below::Format(ImageFormat::Qcow2) => {
            args.layout.cluster_size.map_or(64 << 10, |size| size.0)
        }
        _ => vmdk::GRAIN,
    };
    let target = PackedTarget::begin(opener, args, how, from, file).await;
    let mut target = target.map_err(|failure| to.said(failure))?;
    let work = async {
        let clusters = clusters(from, unit, stop);
        // CAST: a few.
        let at_once = (UNDER_WAY / unit).clamp(2, 64) as usize;
        let packed = clusters.map_ok(|at| cluster(opener, to, how, from, at, unit));
        let mut packed = std::pin::pin!(packed.try_buffered(at_once));
        while let Some((at, found)) = packed.try_next().await? {
            if matches!(found, PackedCluster::Packed(_) | PackedCluster::Plain(_)) {
                from.count(unit.min(from.size - at));
            }
            let put = target.put(at, found).await;
            put.map_err(|error| failed("write", to, at, error))?;
            match from.is_partial() {
                true => progress.add(unit),
                false => progress.reach(at + unit),
            }
            from.pay(unit).await?;
        }
        stop.check(progress, "")
    };
    let done = work.await;
    let finished = target.finish(done.is_ok()).await;
    done?;
    finished.map_err(|failure| to.said(failure))
}

fn method(how: CompressionMethod) -> Compression {
    match how {
        CompressionMethod::Zlib => Compression::Zlib,
        CompressionMethod::Zstd => Compression::Zstd,
    }
}

/// The clusters of `unit` bytes in which the source or the backing image has data, each once and in their order, until
/// the user stops that.
fn clusters<'c>(
    from: &'c Copy<'_>,
    unit: u64,
    stop: &'c Stop,
) -> impl stream::Stream<Item = Result<u64, Failure>> + 'c {
    let ranges = stream::try_unfold((from.walk(), 0), move |(mut walk, next)| async move {
        while let Some(piece) = walk.next().await? {
            if stop.is_wanted() {
                break;
            }
            let end = (piece.offset + piece.len).div_ceil(unit);
            let range: Range<u64> = (piece.offset / unit).max(next)..end;
            if piece.data != [false, false] && !range.is_empty() {
                return Ok(Some((range, (walk, end))));
            }
        }
        Ok(None)
    });
    ranges
        .map_ok(move |range| stream::iter(range.map(move |number| Ok(number * unit))))
        .try_flatten()
}

/// Reads and compresses the cluster at a byte of the disk.
async fn cluster(
    opener: &ImageOpener,
    to: &ImageSpec,
    how: Compression,
    from: &Copy<'_>,
    at: u64,
    unit: u64,
) -> Result<(u64, PackedCluster), Failure> {
    let failed = |error: Errno| failed("compress", to, at, error);
    let len = unit.min(from.size - at);
    let data = from.source(at, len).await?;
    let below = match from.parent {
        Some((image, parent)) if at < parent.size => {
            // CAST: at most a cluster.
            let all = Data::zeroed(len as usize).map_err(failed)?;
            let some = len.min(parent.size - at);
            let seen = walk::read(from.io, image, &parent.disk, at, some).await?;
            seen.copy_to(&all, 0);
            Some(all)
        }
        _ => None,
    };
    if difference(Some(&data), below.as_ref()).is_none() {
        return Ok((at, PackedCluster::Nothing));
    }
    // The last one may be a part of a cluster.
    let mut bytes = data.to_vec();
    if is_zero(&bytes) {
        return Ok((at, PackedCluster::Zeroes(len)));
    }
    // CAST: at most 2 MiB.
    bytes.resize(unit as usize, 0);
    let is_vmdk = to.kind == Below::Format(ImageFormat::Vmdk);
    let work = move || match is_vmdk {
        true => Some(vmdk::pack(&bytes)),
        false => qcow2::pack(how, &bytes),
    };
    let packed = opener.io.elsewhere(work).await.map_err(failed)?;
    Ok((
        at,
        packed.map_or(PackedCluster::Plain(data), PackedCluster::Packed),
    ))
}

impl PackedTarget {
    async fn begin(
        opener: &ImageOpener,
        args: &Convert,
        how: Compression,
        from: &Copy<'_>,
        file: &File,
    ) -> Result<Self, Failure> {
        let to = &args.to;
        if to.kind == Below::Format(ImageFormat::Vmdk) {
            let what = of_vmdk(to, from.size, None)?;
            return Ok(Self::Vmdk(VmdkStream::begin(file, &what).await?));
        }
        let parent = from.parent.map(|(_, parent)| parent);
        let shape = (from.size, from.sector);
        make(file, to, shape, &args.layout, how, parent).await?;
        let parts = ImageParts {
            parent: match from.parent {
                Some((image, _)) => Some(opener.disk(image, None).await?.0),
                None => None,
            },
            ..ImageParts::default()
        };
        let options = Options::new(to.path.display().to_string());
        let image = Qcow2::new(file.clone(), parts, options);
        image.activate().await?;
        Ok(Self::Qcow2(image))
    }

    /// Stores the cluster at a byte of the disk.
    async fn put(&mut self, at: u64, found: PackedCluster) -> Result<(), Errno> {
        match (self, found) {
            (_, PackedCluster::Nothing) | (Self::Vmdk(_), PackedCluster::Zeroes(_)) => Ok(()),
            (Self::Vmdk(image), PackedCluster::Packed(packed)) => image.push(at, &packed).await,
            // A stream has no other grains.
            (Self::Vmdk(_), PackedCluster::Plain(_)) => Err(Errno::INVAL),
            (Self::Qcow2(image), PackedCluster::Packed(packed)) => {
                image.write_packed(at, packed).await
            }
            (Self::Qcow2(image), PackedCluster::Plain(data)) => {
                image
                    .write(at, Bytes::from(data), Attributes::default())
                    .await
            }
            (Self::Qcow2(image), PackedCluster::Zeroes(len)) => {
                image.write_zeroes(at, len, Attributes::default()).await
            }
        }
    }

    /// Makes the image whole and durable; if the copy is not `good`, only ends the use of its file.
    async fn finish(self, good: bool) -> Result<(), Failure> {
        let last = |error: Errno| Failure::system("cannot finish it", &error.into());
        match self {
            Self::Vmdk(image) if good => image.finish().await,
            Self::Vmdk(_) => Ok(()),
            Self::Qcow2(image) => {
                let packed = match good {
                    true => image.finish_packed().await,
                    false => Ok(()),
                };
                let closed = image.close().await;
                packed.and(closed).map_err(last)
            }
        }
    }
}
