// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the control groups of guests are: where this supervisor makes them, and where earlier ones have made those that
//! are left.

use super::Template;
use crate::folder;
use std::cell::RefCell;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// The places of groups, which the next supervisor has to know: nothing else tells it of them.
#[derive(Debug)]
pub(super) struct GroupPlaces {
    /// Where a guest gets its group that has none.
    template: Option<Template>,
    /// That, and those of earlier supervisors.
    all: RefCell<Vec<Template>>,
    /// Entries of the file that are not understood.
    strange: Vec<String>,
    /// Nothing if it could not be read: what is in there is not for us to replace.
    file: Option<PathBuf>,
}

impl GroupPlaces {
    /// Those that `file` tells of, and `template`.
    pub(super) fn open(template: Option<Template>, file: &Path) -> GroupPlaces {
        let (known, is_read) = match read(file) {
            Ok(known) => (known, true),
            Err(error) => {
                tracing::warn!(
                    "groups of guests that an earlier blktapctrl has made elsewhere stay, and are not used any more: \
                     cannot read {}: {error}",
                    file.display()
                );
                (Vec::new(), false)
            }
        };
        let mut places = GroupPlaces {
            template,
            all: RefCell::default(),
            strange: Vec::new(),
            file: is_read.then(|| file.into()),
        };
        for place in known {
            match place.parse() {
                Ok(place) => places.all.get_mut().push(place),
                Err(_) => places.strange.push(place),
            }
        }
        places.begin();
        places
    }

    /// Records a place before a group is created there.
    fn begin(&self) {
        self.forget_unused();
        self.tell();
        let Some(template) = &self.template else {
            return;
        };
        let is_new = !self.all.borrow().contains(template);
        if is_new {
            self.all.borrow_mut().push(template.clone());
            self.write();
        }
    }

    /// Says who keeps a group that is not where one would look for it.
    fn tell(&self) {
        for place in &self.all() {
            if Some(place) == self.template.as_ref() {
                continue;
            }
            let guests = place.ours().unwrap_or_default();
            let guests: Vec<String> = guests.iter().map(u32::to_string).collect();
            tracing::info!(
                "guests that have a control group at {place} keep it, with its limits, as long as they have disks: {}",
                guests.join(", ")
            );
        }
    }

    /// Where a guest gets its group that has none.
    pub(super) fn template(&self) -> Option<&Template> {
        self.template.as_ref()
    }

    /// All of them.
    pub(super) fn all(&self) -> Vec<Template> {
        self.all.borrow().clone()
    }

    /// Those of earlier supervisors are forgotten when there is no group of theirs any more. One that cannot be looked
    /// at may have some.
    pub(super) fn forget_unused(&self) {
        let is_used = |place: &Template| {
            Some(place) == self.template.as_ref()
                || place.ours().map_or(true, |ours| !ours.is_empty())
        };
        let before = self.all.borrow().len();
        self.all.borrow_mut().retain(is_used);
        if self.all.borrow().len() < before {
            self.write();
        }
    }

    fn write(&self) {
        let Some(file) = &self.file else { return };
        let mut known: Vec<String> = self.all().iter().map(Template::to_string).collect();
        known.extend(self.strange.iter().cloned());
        let written = match known.is_empty() {
            true => folder::remove(file),
            false => serde_json::to_vec(&known)
                .map_err(io::Error::from)
                .and_then(|text| folder::replace(file, &text)),
        };
        if let Err(error) = written {
            tracing::warn!(
                "the next blktapctrl does not learn where the control groups of guests are, if it makes them elsewhere \
                 or none: {}: {error}",
                file.display()
            );
        }
    }
}

fn read(file: &Path) -> io::Result<Vec<String>> {
    match fs::read(file) {
        Ok(text) => Ok(serde_json::from_slice(&text)?),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::{GroupPlaces, Template};
    use std::fs;
    use std::path::{Path, PathBuf};

    struct PlacesFolder(PathBuf);

    impl PlacesFolder {
        fn new(name: &str) -> PlacesFolder {
            let dir = std::env::temp_dir().join(format!("places-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            PlacesFolder(dir)
        }

        fn place(&self, name: &str) -> Template {
            let place = self.0.join(name).join("guest-%d");
            place.to_str().unwrap().parse().unwrap()
        }

        fn file(&self) -> PathBuf {
            self.0.join("cgroups.json")
        }
    }

    impl Drop for PlacesFolder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn text(file: &Path) -> String {
        fs::read_to_string(file).unwrap()
    }

    #[test]
    fn what_makes_no_sense_is_not_replaced() {
        let folder = PlacesFolder::new("strange");
        fs::write(folder.file(), "{\"a newer\": \"form\"}").unwrap();
        let places = GroupPlaces::open(Some(folder.place("a")), &folder.file());
        assert_eq!(places.all(), [folder.place("a")], "groups are made");
        assert_eq!(text(&folder.file()), "{\"a newer\": \"form\"}");
        fs::write(folder.file(), "[\"somewhere\"]").unwrap();
        let places = GroupPlaces::open(Some(folder.place("a")), &folder.file());
        assert_eq!(places.all(), [folder.place("a")]);
        let both = format!("[\"{}\",\"somewhere\"]", folder.place("a"));
        assert_eq!(text(&folder.file()), both);
        assert!(GroupPlaces::open(None, &folder.file()).all().is_empty());
        assert_eq!(text(&folder.file()), "[\"somewhere\"]");
    }

    #[test]
    fn place_that_cannot_be_looked_at_is_kept() {
        let folder = PlacesFolder::new("hidden");
        // It is no folder, so the groups in it are unknown.
        fs::write(folder.0.join("a"), "").unwrap();
        drop(GroupPlaces::open(Some(folder.place("a")), &folder.file()));
        let places = GroupPlaces::open(Some(folder.place("b")), &folder.file());
        assert_eq!(places.all(), [folder.place("a"), folder.place("b")]);
        fs::remove_file(folder.0.join("a")).unwrap();
        places.forget_unused();
        assert_eq!(places.all(), [folder.place("b")]);
        assert!(GroupPlaces::open(None, &folder.file()).all().is_empty());
        assert!(!folder.file().exists());
    }
}
