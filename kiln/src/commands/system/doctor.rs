//! `kiln system doctor`.

use crate::context::Context;
use crate::doctor::{self, Finding, Verdict};
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{Format, FormatArgs, Out, print_rows};

/// Tell what will work on this host and what will not, why, and what to do about it
///
/// The exit code is 1 if containers cannot run here.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only what is not well
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    format: FormatArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let mut findings = doctor::examine(context.home());
        let failed = findings.iter().any(|finding| finding.verdict == Verdict::Fail);
        if self.quiet {
            findings.retain(|finding| finding.verdict != Verdict::Ok);
        }
        if self.format.format == Format::Table {
            print(&findings)?;
        } else {
            print_rows(self.format.format, &findings, |_| crate::output::Table::default())?;
        }
        Ok(if failed { Exit::FAILURE } else { Exit::SUCCESS })
    }
}

fn print(findings: &[Finding]) -> Result<()> {
    use unicode_width::UnicodeWidthStr;
    let mut out = Out::new();
    let width = findings.iter().map(|finding| finding.what.width()).max().unwrap_or(0);
    for finding in findings {
        let verdict = finding.verdict.word();
        let padding = " ".repeat(width - finding.what.width());
        out.line(format!("{verdict:<4}  {}{padding}  {}", finding.what, finding.why))?;
        if let Some(advice) = &finding.advice {
            out.line(format!("{:>1$}  → {advice}", "", width + 6))?;
        }
    }
    out.flush()
}
