//! `kiln kernel install`.

use kiln_boot::Source;

use super::New;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;

/// Install a kernel that machines boot, with the modules that they need, and print its name
///
/// `--from host` takes the kernel that this host runs, else the newest in /boot. `--from debian` downloads the newest
/// kernel of this host's Debian or Ubuntu with its apt. Anything else is a path: of a Debian package, of a kernel's
/// file (a bzImage, a vmlinux or an arm64 Image) or of a directory with boot/vmlinuz-* and lib/modules in it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Take it from here: host, debian or a path, several for packages that belong together; this host's
    /// otherwise, or Debian's if there is none
    #[arg(long, value_name = "SOURCE")]
    from: Vec<String>,
    #[command(flatten)]
    new: New,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let host = || Source::Host("/".into());
        let sources = match &self.from[..] {
            [] => vec![host(), Source::Distribution],
            [from] if from == "host" => vec![host()],
            [from] if from == "debian" => vec![Source::Distribution],
            [path] => vec![Source::Path(path.into())],
            several if several.iter().any(|from| from == "host" || from == "debian") => {
                return Err(CliError::usage("--from takes either host, or debian, or paths of packages"));
            }
            packages => vec![Source::Packages(packages.iter().map(Into::into).collect())],
        };
        self.new.install(context, &sources)
    }
}
