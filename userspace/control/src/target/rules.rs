// SPDX-License-Identifier: MIT OR Apache-2.0
//! Behaviour of a new disk on errors, in words of its target: the options of `tap-ctl create` and `tap-ctl set` by
//! their names. xl has no other place for them, and they override the host's defaults.

use super::Target;
use crate::supervisor::{HungAction, Policy};
use crate::tapdisk::OnError;
use crate::Failure;
use std::fmt;

/// The given options. The rest is as it is for other disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SaidRules {
    on_no_space: Option<OnError>,
    on_error: Option<OnError>,
    fail_after_s: Option<u32>,
    hung_after_s: Option<u32>,
    hung: Option<HungAction>,
}

impl SaidRules {
    /// True if it is a word of these.
    pub(super) fn knows(name: &str) -> bool {
        matches!(
            name,
            "on-no-space" | "on-error" | "fail-after" | "hung-after" | "hung"
        )
    }

    /// Reads the value of a word, and returns true if the word had one before.
    pub(super) fn take(&mut self, name: &str, value: &str) -> Result<bool, Failure> {
        Ok(match name {
            "on-no-space" => self.on_no_space.replace(on_error(name, value)?).is_some(),
            "on-error" => self.on_error.replace(on_error(name, value)?).is_some(),
            "fail-after" => self.fail_after_s.replace(seconds(name, value)?).is_some(),
            "hung-after" => self.hung_after_s.replace(seconds(name, value)?).is_some(),
            _ => self.hung.replace(hung(value)?).is_some(),
        })
    }

    /// Returns a policy with these options applied.
    #[must_use]
    pub fn over(&self, policy: Policy) -> Policy {
        Policy {
            on_no_space: self.on_no_space.unwrap_or(policy.on_no_space),
            on_error: self.on_error.unwrap_or(policy.on_error),
            fail_after_s: self.fail_after_s.unwrap_or(policy.fail_after_s),
            hung_after_s: self.hung_after_s.unwrap_or(policy.hung_after_s),
            hung: self.hung.unwrap_or(policy.hung),
            ..policy
        }
    }
}

impl fmt::Display for SaidRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = |what: OnError| match what {
            OnError::Report => "report",
            OnError::Stop => "stop",
        };
        if let Some(what) = self.on_no_space {
            write!(f, "on-no-space={},", error(what))?;
        }
        if let Some(what) = self.on_error {
            write!(f, "on-error={},", error(what))?;
        }
        if let Some(seconds) = self.fail_after_s {
            write!(f, "fail-after={seconds},")?;
        }
        if let Some(seconds) = self.hung_after_s {
            write!(f, "hung-after={seconds},")?;
        }
        match self.hung {
            Some(HungAction::Report) => f.write_str("hung=report,"),
            Some(HungAction::Kill) => f.write_str("hung=kill,"),
            None => Ok(()),
        }
    }
}

impl Target {
    /// Returns the target's options for errors and for processes that hang.
    pub fn rules(&self) -> SaidRules {
        self.disk
            .as_ref()
            .map(|said| said.rules)
            .unwrap_or_default()
    }

    /// Takes it out: that is the disk's and not the image's.
    pub fn take_rules(&mut self) -> SaidRules {
        self.take_of_disk(|said| std::mem::take(&mut said.rules))
            .unwrap_or_default()
    }
}

fn on_error(name: &str, text: &str) -> Result<OnError, Failure> {
    match text {
        "report" => Ok(OnError::Report),
        "stop" => Ok(OnError::Stop),
        _ => Err(Failure::invalid(format!(
            "{name}={text}: write {name}=report, and the guest sees the error, or {name}=stop, and it waits until the disk is unpaused"
        ))),
    }
}

fn hung(text: &str) -> Result<HungAction, Failure> {
    match text {
        "report" => Ok(HungAction::Report),
        "kill" => Ok(HungAction::Kill),
        _ => Err(Failure::invalid(format!(
            "hung={text}: write hung=kill, and a process that hangs is replaced, or hung=report, and an event tells"
        ))),
    }
}

fn seconds(name: &str, text: &str) -> Result<u32, Failure> {
    text.parse().map_err(|_| {
        Failure::invalid(format!(
            "{name}={text}: write a number of seconds, such as 60; 0 is for never"
        ))
    })
}

#[cfg(test)]
mod tests {
    use crate::supervisor::{HungAction, Policy};
    use crate::tapdisk::OnError;
    use crate::Target;

    #[test]
    fn what_is_done_when_things_go_wrong_is_said_before_the_driver() {
        let text =
            "on-no-space=report,on-error=stop,fail-after=60,hung-after=5,hung=kill,aio:/srv/a";
        let mut target: Target = text.parse().unwrap();
        assert_eq!(target.to_string(), text);
        assert_eq!(
            Target::from_params(&format!("aio:{text}")),
            Ok(target.clone())
        );
        let policy = target.take_rules().over(Policy::default());
        let expected = Policy {
            on_no_space: OnError::Report,
            on_error: OnError::Stop,
            fail_after_s: 60,
            hung_after_s: 5,
            hung: HungAction::Kill,
            ..Policy::default()
        };
        assert_eq!(policy, expected);
        assert_eq!(target, "aio:/srv/a".parse().unwrap());
        // Rules that the target does not set stay.
        let some: Target = "hung=report,aio:/srv/a".parse().unwrap();
        let only = Policy {
            hung: HungAction::Report,
            ..expected.clone()
        };
        assert_eq!(some.rules().over(expected), only);
        for wrong in [
            "on-error=ignore,aio:/a",
            "on-no-space=,aio:/a",
            "hung=yes,aio:/a",
            "fail-after=-1,aio:/a",
            "hung-after=1m,aio:/a",
            "on-error=stop,on-error=stop,aio:/a",
            "on-error=stop",
        ] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }
}
