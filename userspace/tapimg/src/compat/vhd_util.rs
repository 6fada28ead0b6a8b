// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vhd-util`, as scripts call it.

use super::{mib, MIB};
use crate::chain::below;
use crate::cli;
use crate::image_spec::ImageSpec;
use crate::open::{ImageOpener, Use, DEEPEST};
use crate::signals::Stop;
use crate::{check, commit, create, rebase, resize};
use clap::{Args, Parser, Subcommand};
use control::{Code, Failure};
use diskio::File;
use formats::vhd::{self, Facts};
use formats::{look, Below, ImageFormat, ImageNeeds};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// Makes and changes VHDs, with the options of blktap's program of this name.
///
/// Images are locked while they are used: what a guest is using is refused, where the other program relied on its
/// caller. Journals are not needed: whenever the work ends, the image is whole. XCP-ng's storage manager needs verbs and
/// options that are missing here.
#[derive(Debug, Parser)]
#[command(name = "vhd-util", version)]
pub(super) struct VhdUtilCli {
    /// Taken, and of no effect
    #[arg(long, global = true)]
    debug: bool,
    #[command(subcommand)]
    verb: VhdUtilVerb,
}

#[derive(Debug, Subcommand)]
enum VhdUtilVerb {
    /// Make an image
    Create {
        #[command(flatten)]
        image: Name,
        /// Size of the disk in MiB
        #[arg(short, value_name = "MIB")]
        size: u64,
        /// As large as the disk at once (a fixed VHD)
        #[arg(short)]
        reserve: bool,
        /// Size in MiB that the disk can have without moving its table
        #[arg(short = 'S', value_name = "MIB", conflicts_with = "reserve")]
        most: Option<u64>,
    },
    /// Make an image over a backing image
    Snapshot {
        #[command(flatten)]
        image: Name,
        /// Backing image
        #[arg(short, value_name = "FILE")]
        parent: PathBuf,
        /// Images of the new chain at most
        #[arg(short, value_name = "COUNT")]
        limit: Option<usize>,
        /// The parent is raw
        #[arg(short = 'm')]
        raw: bool,
        /// Size in MiB that the disk can have without moving its table
        #[arg(short = 'S', value_name = "MIB")]
        most: Option<u64>,
        /// Accepted without effect: an empty image can be a backing image, too
        #[arg(short)]
        empty: bool,
    },
    /// Say what an image is
    Query(Query),
    /// Set a field: `hidden` marks an image that no guest has
    Set {
        #[command(flatten)]
        image: Name,
        /// hidden
        #[arg(short, value_name = "FIELD", value_parser = ["hidden"])]
        field: String,
        /// 0 or 1
        #[arg(short, value_parser = clap::value_parser!(u8).range(0..=1))]
        value: u8,
    },
    /// Name another parent, without a look at what it holds
    Modify {
        #[command(flatten)]
        image: Name,
        /// The parent
        #[arg(short, value_name = "FILE")]
        parent: PathBuf,
        /// The parent is a raw image
        #[arg(short = 'm')]
        raw: bool,
    },
    /// Make the disk larger
    Resize {
        #[command(flatten)]
        image: Name,
        /// Size in MiB
        #[arg(short, value_name = "MIB")]
        size: u64,
        /// Taken, and not written
        #[arg(short, value_name = "FILE")]
        journal: Option<PathBuf>,
        /// Only if the table need not move
        #[arg(short, conflicts_with = "journal")]
        fast: bool,
    },
    /// Look for damage
    Check {
        #[command(flatten)]
        image: Name,
        /// One footer is enough
        #[arg(short)]
        ignore: bool,
    },
    /// Give the parent what an image has itself
    Coalesce {
        #[command(flatten)]
        image: Name,
        /// Tell how far it is
        #[arg(short)]
        progress: bool,
        /// Taken, and of no effect: zeroes are not written
        #[arg(short)]
        sparse: bool,
    },
    /// Say what several images are, a line each
    Scan(Scan),
}

#[derive(Debug, Args)]
struct Name {
    /// The image
    #[arg(short, value_name = "FILE")]
    name: PathBuf,
}

#[derive(Debug, Args)]
struct Query {
    #[command(flatten)]
    image: Name,
    /// Size of the disk in MiB
    #[arg(short = 'v')]
    size: bool,
    /// Bytes of the file
    #[arg(short = 's')]
    file: bool,
    /// The parent
    #[arg(short)]
    parent: bool,
    /// Whether it is hidden
    #[arg(short = 'f')]
    hidden: bool,
    /// Images of its chain
    #[arg(short)]
    depth: bool,
    /// Blocks that exist
    #[arg(short)]
    allocated: bool,
    /// Size in MiB that the disk can have without moving its table
    #[arg(short = 'S')]
    most: bool,
}

#[derive(Debug, Args)]
struct Scan {
    /// Files that fit, such as /srv/*.vhd
    #[arg(short = 'm', value_name = "PATTERN")]
    pattern: Option<PathBuf>,
    /// Taken, and of no effect
    #[arg(short)]
    fast: bool,
    /// Do not end with one that cannot be read
    #[arg(short = 'c')]
    go_on: bool,
    /// Images
    files: Vec<PathBuf>,
}

/// Does it, and says what is printed.
pub(super) async fn verb(cli: &VhdUtilCli, opener: &ImageOpener) -> Result<String, Failure> {
    match &cli.verb {
        VhdUtilVerb::Create {
            image,
            size,
            reserve,
            most,
        } => {
            let layout = cli::Layout {
                fixed: *reserve,
                reserve: most.map(mib).transpose()?,
                ..cli::Layout::default()
            };
            make(opener, image.vhd()?, Some(mib(*size)?), layout).await
        }
        VhdUtilVerb::Snapshot {
            image,
            parent,
            limit,
            raw,
            most,
            empty: _,
        } => {
            let parent = named(parent, *raw)?;
            if let Some(limit) = limit {
                let depth = depth(opener, &parent).await?;
                if depth >= *limit {
                    let why = format!("snapshot depth exceeded: {depth}, not below {limit}");
                    return Err(Failure::new(Code::Image, why));
                }
            }
            let layout = cli::Layout {
                parent: Some(parent),
                reserve: most.map(mib).transpose()?,
                ..cli::Layout::default()
            };
            make(opener, image.vhd()?, None, layout).await
        }
        VhdUtilVerb::Query(query) => query.answer(opener).await,
        VhdUtilVerb::Set { image, value, .. } => {
            let file = opener.file(&image.vhd()?.path, Use::Write).await?;
            vhd::hide(&file, *value == 1).await.map(|()| String::new())
        }
        VhdUtilVerb::Modify { image, parent, raw } => {
            let rebase = cli::Rebase {
                image: image.vhd()?,
                parent: Some(named(parent, *raw)?),
                no_parent: false,
                moved: false,
                name_only: true,
                progress: false,
            };
            let done = rebase::rebase(opener, &Stop::default(), &rebase).await;
            done.map(|_| String::new())
        }
        VhdUtilVerb::Resize {
            image, size, fast, ..
        } => grow(opener, image.vhd()?, mib(*size)?, *fast).await,
        VhdUtilVerb::Check { image, ignore } => {
            let image = image.vhd()?;
            let name = image.path.display().to_string();
            let check = cli::Check {
                image,
                repair: false,
                data: false,
            };
            let mut found = check::check(opener, &check).await?;
            if *ignore {
                found = found.without_footers();
            }
            match found.is_good() {
                true => Ok(format!("{name} is valid\n")),
                // A message is one line.
                false => {
                    let said = found.text().trim().replace('\n', "; ");
                    Err(Failure::new(Code::Image, said))
                }
            }
        }
        VhdUtilVerb::Coalesce {
            image, progress, ..
        } => {
            let commit = cli::Commit {
                image: image.vhd()?,
                progress: *progress,
            };
            let done = commit::commit(opener, &Stop::default(), &commit).await?;
            Ok(format!("Coalesced {} sectors", done.written() / 512))
        }
        VhdUtilVerb::Scan(scan) => scan.answer(opener).await,
    }
}

impl Name {
    fn vhd(&self) -> Result<ImageSpec, Failure> {
        named(&self.name, false)
    }
}

fn named(path: &Path, is_raw: bool) -> Result<ImageSpec, Failure> {
    super::named(
        path,
        match is_raw {
            true => Below::Raw,
            false => Below::Format(ImageFormat::Vhd),
        },
    )
}

/// Makes an image; an existing one is replaced, as with the other program, unless it is in use.
async fn make(
    opener: &ImageOpener,
    image: ImageSpec,
    size: Option<cli::Size>,
    layout: cli::Layout,
) -> Result<String, Failure> {
    let create = cli::CreateImage {
        image,
        size: size.map(|size| control::NewSize::Bytes(size.0)),
        layout,
        force: true,
    };
    let made = create::create(opener, &create).await;
    made.map(|_| String::new())
}

async fn grow(
    opener: &ImageOpener,
    image: ImageSpec,
    size: cli::Size,
    fast: bool,
) -> Result<String, Failure> {
    if fast {
        let (_, facts) = facts(opener, &image).await?;
        if size.0 > facts.most {
            return Err(image.said(Failure::new(
                Code::Image,
                format!(
                    "its table has room for {} MiB: detach the disk and leave -f out",
                    facts.most / MIB
                ),
            )));
        }
    }
    let resize = cli::Resize {
        image,
        size: control::NewSize::Bytes(size.0),
        shrink: false,
        lose_data: false,
    };
    let done = resize::resize(opener, &resize).await;
    done.map(|_| String::new())
}

/// An image may be in use while it is looked at.
async fn facts(opener: &ImageOpener, image: &ImageSpec) -> Result<(File, Facts), Failure> {
    let file = opener.file(&image.path, Use::Look).await?;
    let facts = vhd::facts(&file).await;
    Ok((file, facts.map_err(|failure| image.said(failure))?))
}

async fn parent(
    opener: &ImageOpener,
    image: &ImageSpec,
    file: &File,
) -> Result<Option<ImageSpec>, Failure> {
    let needs: ImageNeeds = look(ImageFormat::Vhd, file)
        .await
        .map_err(|failure| image.said(failure))?;
    if needs
        .parent
        .as_ref()
        .is_some_and(|parent| parent.names.is_empty())
    {
        return Err(image.said(Failure::new(
            Code::Image,
            "it has a parent and does not name it: the image is damaged",
        )));
    }
    Ok(below(opener, image, &needs))
}

/// Where an image is, without links; as it was named if it is not there.
fn real(image: &ImageSpec) -> String {
    let path = fs::canonicalize(&image.path);
    path.as_deref().unwrap_or(&image.path).display().to_string()
}

/// Images of a chain.
async fn depth(opener: &ImageOpener, image: &ImageSpec) -> Result<usize, Failure> {
    let (mut count, mut next) = (0, Some(image.clone()));
    while let Some(at) = next.take() {
        count += 1;
        if count > DEEPEST {
            let why = format!("the chain of {image} has more than {DEEPEST} images");
            return Err(Failure::new(Code::Image, why));
        }
        if at.kind != Below::Raw {
            let file = opener.file(&at.path, Use::Look).await?;
            next = parent(opener, &at, &file).await?;
        }
    }
    Ok(count)
}

impl Query {
    async fn answer(&self, opener: &ImageOpener) -> Result<String, Failure> {
        let image = self.image.vhd()?;
        let (file, facts) = facts(opener, &image).await?;
        let mut text = String::new();
        let mut line = |line: String| text.push_str(&(line + "\n"));
        if self.size {
            line((facts.size / MIB).to_string());
        }
        if self.file {
            line(file_size(&image, &file)?.to_string());
        }
        if self.parent {
            line(match parent(opener, &image, &file).await? {
                Some(parent) => real(&parent),
                None => format!("{} has no parent", image.path.display()),
            });
        }
        if self.hidden {
            line(format!("hidden: {}", u8::from(facts.is_hidden)));
        }
        if self.depth {
            line(format!("chain depth: {}", depth(opener, &image).await?));
        }
        if self.allocated {
            line(facts.blocks.to_string());
        }
        if self.most {
            line((facts.most / MIB).to_string());
        }
        Ok(text)
    }
}

fn file_size(image: &ImageSpec, file: &File) -> Result<u64, Failure> {
    file.size()
        .map_err(|error| Failure::system(format!("cannot see the size of {image}"), &error))
}

impl Scan {
    async fn answer(&self, opener: &ImageOpener) -> Result<String, Failure> {
        let mut files = self.files.clone();
        if let Some(pattern) = &self.pattern {
            files.extend(fitting(pattern)?);
        }
        let mut text = String::new();
        for file in files {
            let name = file.display();
            let said = match line(opener, &file).await {
                Ok(said) => said,
                Err(failure) if self.go_on => format!(
                    "vhd={name} scan-error={} error-message='{}'",
                    super::number(failure.code),
                    failure.message.replace('\'', "\"")
                ),
                Err(failure) => return Err(failure),
            };
            let _ = writeln!(text, "{said}");
        }
        Ok(text)
    }
}

async fn line(opener: &ImageOpener, path: &Path) -> Result<String, Failure> {
    let image = named(path, false)?;
    let (file, facts) = facts(opener, &image).await?;
    let parent = parent(opener, &image, &file).await?;
    Ok(format!(
        "vhd={} capacity={} size={} hidden={} parent={}",
        path.display(),
        facts.size,
        file_size(&image, &file)?,
        u8::from(facts.is_hidden),
        parent.as_ref().map_or("none".into(), real),
    ))
}

/// The files of a folder whose names fit a pattern, in order: `*` stands for anything there.
fn fitting(pattern: &Path) -> Result<Vec<PathBuf>, Failure> {
    let folder = match pattern.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let wanted = pattern.file_name().unwrap_or_default().to_string_lossy();
    let failed = |error| Failure::system(format!("cannot look into {}", folder.display()), &error);
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        // As a shell has it.
        let is_shown = wanted.starts_with('.') || !name.as_encoded_bytes().starts_with(b".");
        if is_shown && fits(&wanted, &name.to_string_lossy()) {
            found.push(folder.join(name));
        }
    }
    found.sort();
    Ok(found)
}

fn fits(pattern: &str, name: &str) -> bool {
    let Some((front, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(left) = name.strip_prefix(front) else {
        return false;
    };
    let ends = left.char_indices().map(|(at, _)| at).chain([left.len()]);
    ends.into_iter().any(|at| fits(rest, &left[at..]))
}

#[cfg(test)]
mod tests {
    use super::{fits, VhdUtilCli};
    use clap::{CommandFactory, Parser};

    #[test]
    fn description_is_sound() {
        VhdUtilCli::command().debug_assert();
    }

    #[test]
    fn lines_of_scripts_are_understood() {
        for line in [
            "create --debug -n /a.vhd -s 10240",
            "create --debug -n /a.vhd -s 10240 -S 2097152",
            "create --debug -n /a.vhd -s 10 -r",
            "snapshot --debug -n /b.vhd -p /a.vhd",
            "snapshot --debug -n /b.vhd -p /a -m -S 100 -e",
            "query --debug -vspf -n /a.vhd",
            "query --debug -d -n /a.vhd",
            "set --debug -n /a.vhd -f hidden -v 1",
            "modify --debug -p /a.vhd -n /b.vhd",
            "modify --debug -p /a.vhd -n /b.vhd -m",
            "resize --debug -s 20480 -n /a.vhd -j /a.journal",
            "resize --debug -s 20480 -n /a.vhd -f",
            "check --debug -n /a.vhd",
            "check --debug -n /a.vhd -i",
            "coalesce --debug -n /b.vhd",
            "scan -f -m /srv/*.vhd",
        ] {
            let words = ["vhd-util"].into_iter().chain(line.split(' '));
            assert!(VhdUtilCli::try_parse_from(words).is_ok(), "{line}");
        }
    }

    #[test]
    fn patterns() {
        assert!(fits("*.vhd", "a.vhd") && fits("a*", "a") && fits("a*b*c", "a-b-b-c"));
        assert!(!fits("*.vhd", "a.vhdx") && !fits("a*b", "ba") && !fits("a", "ab"));
    }
}
