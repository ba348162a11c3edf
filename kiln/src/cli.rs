//! The command line as a whole.

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::Styles;
use clap::builder::styling::{AnsiColor, Effects};
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::CompleteEnv;
use kiln_contract::Home;

#[cfg(target_os = "linux")]
use crate::commands::fs;
use crate::commands::{self, image, kernel, network, snapshot, system, template, volume};
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::{self, Exit, Owner};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Yellow.on_default().effects(Effects::BOLD))
    .usage(AnsiColor::Yellow.on_default().effects(Effects::BOLD))
    .literal(AnsiColor::Green.on_default())
    .placeholder(AnsiColor::Cyan.on_default());

/// Run Linux workloads in isolation, from one content-addressed store
#[derive(Debug, Parser)]
#[command(
    name = "kiln",
    bin_name = "kiln",
    version,
    styles = STYLES,
    propagate_version = false,
    disable_help_subcommand = true,
    subcommand_required = true,
    arg_required_else_help = true,
    args_override_self = true,
    max_term_width = 100,
)]
pub(crate) struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct GlobalArgs {
    /// Keep everything below this directory ($KILN_HOME; /var/lib/kiln for root, ~/.local/share/kiln for others)
    #[arg(long, global = true, value_name = "DIR", help_heading = "Global options")]
    home: Option<PathBuf>,
    /// Tell on standard error what is being done; twice for more ($KILN_LOG)
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<commands::run::Args>),
    Create(Box<commands::create::Args>),
    Start(commands::start::Args),
    Stop(commands::stop::Args),
    Restart(commands::restart::Args),
    Kill(commands::kill::Args),
    Update(commands::update::Args),
    Fork(commands::fork::Args),
    /// Save instances, and put them back
    #[command(subcommand, arg_required_else_help = true)]
    Snapshot(snapshot::Command),
    Resize(commands::resize::Args),
    Pause(commands::pause::Args),
    #[command(visible_alias = "unpause")]
    Resume(commands::resume::Args),
    Wait(commands::wait::Args),
    #[command(visible_alias = "remove")]
    Rm(commands::rm::Args),
    Rename(commands::rename::Args),
    Exec(Box<commands::exec::Args>),
    Attach(commands::attach::Args),
    Ssh(Box<commands::ssh::Args>),
    SshConfig(commands::ssh_config::Args),
    Console(commands::console::Args),
    Logs(commands::logs::Args),
    Cp(commands::cp::Args),
    #[command(visible_alias = "ls")]
    Ps(commands::ps::Args),
    Inspect(commands::inspect::Args),
    Top(commands::top::Args),
    Stats(commands::stats::Args),
    Port(commands::port::Args),
    Commit(commands::commit::Args),
    Diff(commands::diff::Args),
    /// Work with images
    #[command(subcommand, visible_alias = "i", arg_required_else_help = true)]
    Image(Box<image::Command>),
    Pull(image::pull::Args),
    Push(image::push::Args),
    Images(image::ls::Args),
    Rmi(image::rm::Args),
    Tag(image::tag::Args),
    Login(commands::login::Args),
    Logout(commands::logout::Args),
    #[command(hide = true)]
    Save(image::save::Args),
    #[command(hide = true)]
    Load(image::load::Args),
    /// Work with volumes
    #[command(subcommand, arg_required_else_help = true)]
    Volume(volume::Command),
    /// Work with networks
    #[command(subcommand, arg_required_else_help = true)]
    Network(network::Command),
    /// Work with the kernels that machines boot
    #[command(subcommand, arg_required_else_help = true)]
    Kernel(kernel::Command),
    /// Work with the templates that machines start from
    #[command(subcommand, arg_required_else_help = true)]
    Template(template::Command),
    Init(commands::init::Args),
    #[cfg(target_os = "linux")]
    /// See images as directories, edit them and commit what was changed
    #[command(subcommand, arg_required_else_help = true)]
    Fs(fs::Command),
    /// Look at and care for the whole
    #[command(subcommand, arg_required_else_help = true)]
    System(system::Command),
    Completion(commands::completion::Args),
    #[command(hide = true)]
    Supervise(commands::supervise::Args),
    #[command(hide = true)]
    Monitor(commands::monitor::Args),
    #[command(hide = true)]
    Spare(commands::spare::Args),
    #[command(hide = true)]
    SshProxy(commands::ssh_proxy::Args),
    #[command(hide = true)]
    FetchObject(commands::fetch_object::Args),
    #[command(hide = true)]
    Man(commands::man::Args),
}

/// The commands on whose way milliseconds and kilobytes count, by themselves: building the definitions of all the
/// others takes some ten percent of the time of a whole `kiln run`, and a supervisor would keep the memory.
#[derive(Debug, Parser)]
#[command(
    name = "kiln",
    bin_name = "kiln",
    version,
    styles = STYLES,
    args_override_self = true,
    max_term_width = 100,
)]
struct Quick {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    command: QuickCommand,
}

#[derive(Debug, Subcommand)]
enum QuickCommand {
    Run(Box<commands::run::Args>),
    Exec(Box<commands::exec::Args>),
    #[command(hide = true)]
    Supervise(commands::supervise::Args),
    #[command(hide = true)]
    Monitor(commands::monitor::Args),
    #[command(hide = true)]
    Spare(commands::spare::Args),
    #[command(hide = true)]
    SshProxy(commands::ssh_proxy::Args),
}

impl From<Quick> for Cli {
    fn from(quick: Quick) -> Self {
        let command = match quick.command {
            QuickCommand::Run(args) => Command::Run(args),
            QuickCommand::Exec(args) => Command::Exec(args),
            QuickCommand::Supervise(args) => Command::Supervise(args),
            QuickCommand::Monitor(args) => Command::Monitor(args),
            QuickCommand::Spare(args) => Command::Spare(args),
            QuickCommand::SshProxy(args) => Command::SshProxy(args),
        };
        Self { global: quick.global, command }
    }
}

fn parse(words: &[OsString]) -> std::result::Result<Cli, clap::Error> {
    match exit::verb(words) {
        Some("run" | "exec" | "supervise" | "monitor" | "spare" | "ssh-proxy") => {
            Quick::try_parse_from(words).map(Cli::from)
        }
        _ => Cli::try_parse_from(words),
    }
}

/// `kiln help run` is `kiln run --help`, as in Docker.
fn help_as_flag(mut words: Vec<OsString>) -> Vec<OsString> {
    if words.get(1).is_some_and(|word| word == "help") {
        words.remove(1);
        words.push("--help".into());
    }
    words
}

/// Everything: completion, parsing, running, ending.
pub(crate) fn main() -> ExitCode {
    if std::env::var_os("COMPLETE").is_some() {
        CompleteEnv::with_factory(Cli::command).complete();
    }
    let words = help_as_flag(std::env::args_os().collect());
    match parse(&words) {
        Ok(cli) => {
            let owner = cli.command.owner();
            exit::finish(cli.run(), owner)
        }
        Err(error) => exit::finish_usage(&error, &words),
    }
}

impl Cli {
    fn run(self) -> Result<Exit> {
        start_logging(self.global.verbose, self.command.usual_log())?;
        if let Some(result) = self.command.run_without_home() {
            return result;
        }
        let context = Context::new(settle_home(self.global.home)?);
        self.command.run(&context)
    }
}

/// Decides where everything is, before a user namespace makes an ordinary user look like root, and tells all
/// processes that come from this one.
fn settle_home(given: Option<PathBuf>) -> Result<Home> {
    let home =
        match given {
            Some(path) => {
                let absolute = std::path::absolute(&path);
                Home::at(absolute.map_err(|error| {
                    CliError::file(format!("cannot use --home {}", path.display()), error)
                })?)
            }
            None => Home::from_env(rustix::process::geteuid().is_root()).ok_or_else(|| {
                CliError::failed("cannot tell where to keep things: $HOME is not set")
                    .with_hint("set $KILN_HOME, or give --home DIR")
            })?,
        };
    // SAFETY: nothing has started a thread yet, so nobody reads the environment meanwhile.
    unsafe { std::env::set_var("KILN_HOME", home.path()) };
    Ok(home)
}

/// Spans and events go to standard error with `--verbose`, or as `$KILN_LOG` says; else as is `usual`, or nothing is set up.
fn start_logging(verbose: u8, usual: Option<&str>) -> Result<()> {
    let given = std::env::var("KILN_LOG").ok().filter(|text| !text.is_empty());
    let directives = match (verbose, given) {
        (0, None) => match usual {
            Some(usual) => usual.to_owned(),
            None => return Ok(()),
        },
        (0, Some(text)) => text,
        (1, _) => "info".to_owned(),
        (_, _) => "debug".to_owned(),
    };
    let filter = tracing_subscriber::EnvFilter::try_new(&directives)
        .map_err(|error| CliError::usage(format!("invalid $KILN_LOG `{directives}`: {error}")))?;
    // A second subscriber cannot be there: this is called once.
    let plain =
        !std::io::stderr().is_terminal() || std::env::var_os("NO_COLOR").is_some_and(|set| !set.is_empty());
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    subscriber.with_ansi(!plain).without_time().init();
    Ok(())
}

impl Command {
    /// The level of what is logged without being asked for, where it is not the usual one.
    fn usual_log(&self) -> Option<&'static str> {
        match self {
            // Their servers go on in the background, and what is wrong with a tree is told in their log only.
            #[cfg(target_os = "linux")]
            Self::Fs(_) => Some("error"),
            // Its standard error is the workload's: whoever waits for a start that takes seconds is told why, and no more.
            #[cfg(target_os = "linux")]
            Self::Monitor(_) => Some("off,kiln_machine::beginning=warn"),
            _ => None,
        }
    }

    /// To whom the exit code belongs.
    fn owner(&self) -> Owner {
        match self {
            Self::Run(_) | Self::Create(_) | Self::Exec(_) => Owner::Workload,
            #[cfg(target_os = "linux")]
            Self::Fs(command) => command.owner(),
            _ => Owner::Kiln,
        }
    }

    /// Commands that need nothing of what is kept.
    fn run_without_home(&self) -> Option<Result<Exit>> {
        match self {
            Self::Completion(args) => Some(args.run(&mut Cli::command())),
            Self::Man(args) => Some(args.run(&Cli::command())),
            _ => None,
        }
    }

    fn run(self, context: &Context) -> Result<Exit> {
        match self {
            Self::Run(args) => args.run(context),
            Self::Create(args) => args.run(context),
            Self::Start(args) => args.run(context),
            Self::Stop(args) => args.run(context),
            Self::Restart(args) => args.run(context),
            Self::Kill(args) => args.run(context),
            Self::Update(args) => args.run(context),
            Self::Fork(args) => args.run(context),
            Self::Snapshot(command) => command.run(context),
            Self::Resize(args) => args.run(context),
            Self::Pause(args) => args.run(context),
            Self::Resume(args) => args.run(context),
            Self::Wait(args) => args.run(context),
            Self::Rm(args) => args.run(context),
            Self::Rename(args) => args.run(context),
            Self::Exec(args) => args.run(context),
            Self::Attach(args) => args.run(context),
            Self::Ssh(args) => args.run(context),
            Self::SshConfig(args) => args.run(context),
            Self::Console(args) => args.run(context),
            Self::Logs(args) => args.run(context),
            Self::Cp(args) => args.run(context),
            Self::Ps(args) => args.run(context),
            Self::Inspect(args) => args.run(context),
            Self::Top(args) => args.run(context),
            Self::Stats(args) => args.run(context),
            Self::Port(args) => args.run(context),
            Self::Commit(args) => args.run(context),
            Self::Diff(args) => args.run(context),
            Self::Image(command) => command.run(context),
            Self::Pull(args) => args.run(context),
            Self::Push(args) => args.run(context),
            Self::Images(args) => args.run(context),
            Self::Rmi(args) => args.run(context),
            Self::Tag(args) => args.run(context),
            Self::Login(args) => args.run(context),
            Self::Logout(args) => args.run(context),
            Self::Save(args) => args.run(context),
            Self::Load(args) => args.run(context),
            Self::Volume(command) => command.run(context),
            Self::Network(command) => command.run(context),
            Self::Kernel(command) => command.run(context),
            Self::Template(command) => command.run(context),
            Self::Init(args) => args.run(context),
            #[cfg(target_os = "linux")]
            Self::Fs(command) => command.run(context),
            Self::System(command) => command.run(context),
            Self::Supervise(args) => args.run(context),
            Self::Spare(args) => args.run(context),
            Self::Monitor(args) => args.run(context),
            Self::SshProxy(args) => args.run(context),
            Self::FetchObject(args) => args.run(context),
            Self::Completion(_) | Self::Man(_) => Ok(Exit::SUCCESS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        Cli::command().debug_assert();
        Quick::command().debug_assert();
    }

    #[test]
    fn the_last_of_a_flag_that_takes_one_value_counts() {
        let line = "kiln run --rm --rm --name a -e A=1 --name b -e B=2 alpine";
        let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let shown = format!("{:?}", parse(&words).unwrap().command);
        assert!(shown.contains("name: Some(\"b\")") && shown.contains("[\"A=1\", \"B=2\"]"), "{shown}");
    }

    #[test]
    fn help_may_come_first() {
        let table = [
            ("kiln help", "kiln --help"),
            ("kiln help image ls", "kiln image ls --help"),
            ("kiln run help", "kiln run help"),
        ];
        for (typed, meant) in table {
            let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
            assert_eq!(help_as_flag(words(typed)), words(meant));
        }
    }

    #[test]
    fn quick_commands_parse_as_they_do_among_the_others() {
        let table = [
            "kiln run -it --rm alpine sh -c x",
            "kiln -v --home /x run -p 80:80 alpine",
            "kiln exec -e A=1 web ls -l",
            "kiln run",
            "kiln run --bogus alpine",
            "kiln run --memory much alpine",
            "kiln run --help",
            "kiln exec --help",
            "kiln exec web",
            "kiln --bogus run alpine",
            "kiln supervise nonsense 3",
            "kiln --home /x ssh-proxy --key a nonsense",
            "kiln run --rm --rm --name a -e A=1 --name b -e B=2 alpine",
        ];
        for line in table {
            let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            let shown = |parsed: std::result::Result<Cli, clap::Error>| {
                parsed.map(|cli| format!("{:?}", cli.command)).map_err(|error| error.to_string())
            };
            assert_eq!(shown(parse(&words)), shown(Cli::try_parse_from(&words)), "{line}");
        }
    }
}
