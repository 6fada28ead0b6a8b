// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl trace`: traces of a guest's requests.

use crate::time::utc;
use crate::{cli, named};
use control::supervisor::Request;
use control::{Failure, TraceTo, Tracing};

pub(crate) fn request(asked: &cli::Trace) -> Result<Request, Failure> {
    let which = named(&asked.which);
    if asked.end {
        return Ok(Request::EndTrace(which));
    }
    let to = asked.output.as_ref().map(|file| {
        let path = std::path::absolute(file)
            .map_err(|error| Failure::system(format!("cannot find {}", file.display()), &error))?;
        Ok(TraceTo {
            path,
            data: asked.data,
            size: asked.size,
        })
    });
    let to = to.transpose()?;
    Ok(Request::Trace { which, to })
}

/// A trace as words `name=value`.
pub(crate) fn show(trace: Option<&Tracing>) -> String {
    let Some(trace) = trace else {
        return "trace=none\n".into();
    };
    format!(
        "trace={} data={} size={} since={}\n",
        trace.path.display(),
        if trace.data { "yes" } else { "no" },
        trace.size,
        utc(trace.at_ms)
    )
}
