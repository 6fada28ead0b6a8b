// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks as they are named on the command line: an image as in other verbs, or any target of a tap disk.

use crate::image_spec::ImageSpec;
use control::{Failure, Target};
use std::fmt;
use std::str::FromStr;

/// Disk to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServedTarget(Target);

impl ServedTarget {
    pub(crate) fn target(&self) -> &Target {
        &self.0
    }
}

impl fmt::Display for ServedTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for ServedTarget {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        let target = text.parse();
        // Other verbs take a path as the shell has it, and a target only an absolute one.
        match (target, text.parse::<ImageSpec>()) {
            (Err(_), Ok(named)) => {
                let key = match &named.key {
                    Some(key) => format!(
                        "key={},",
                        std::path::absolute(key).map_err(unknown)?.display()
                    ),
                    None => String::new(),
                };
                format!("{key}{named}").parse().map(Self)
            }
            (target, _) => target.map(Self),
        }
    }
}

fn unknown(error: std::io::Error) -> Failure {
    Failure::system("cannot find the file that key= names", &error)
}

#[cfg(test)]
mod tests {
    use super::ServedTarget;

    #[test]
    fn paths_are_those_of_the_shell_and_targets_those_of_a_configuration() {
        let here = std::env::current_dir().unwrap();
        let here = here.display();
        for (text, target) in [
            ("qcow2:/a", "qcow2:/a".to_owned()),
            ("qcow2:a", format!("qcow2:{here}/a")),
            ("raw:a,b", format!("aio:{here}/a,b")),
            ("key=k,luks:a", format!("key={here}/k,luks:{here}/a")),
            ("cow:qcow2:/a", "cow:qcow2:/a".into()),
            ("cache=2M,vhd:/a", "cache=2097152,vhd:/a".into()),
            ("ram:1M", "ram:1048576".into()),
        ] {
            assert_eq!(text.parse::<ServedTarget>().unwrap().to_string(), target);
        }
        for (text, why) in [
            ("/a", "which driver"),
            ("qcow3:/a", "no driver 'qcow3'"),
            ("cow:a", "absolute path"),
            ("ram:", "no size"),
        ] {
            let failure = text.parse::<ServedTarget>().unwrap_err();
            assert!(failure.message.contains(why), "{text}: {failure}");
        }
    }
}
