//! What this program is when it is not the tests: the few commands of `kiln` that own or show a container.

use std::io::Write as _;
use std::os::fd::AsFd;
use std::process::ExitCode;

use kiln_container::Containers;
use kiln_contract::{
    AttachEnd, AttachOptions, BackendError, ErrorKind, ExecSpec, Home, RuntimeBackend, StartMode, Stdio,
};

/// Runs a command, if that is what the arguments ask for. `detached` is exit code 42.
pub(crate) fn dispatch(arguments: &[String]) -> Option<ExitCode> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ended = match words[..] {
        ["supervise", id, ready] => supervise(id, ready),
        ["test-create", spec] => create(spec),
        ["test-start", name] => start(name, true),
        ["test-start", "--no-sig-proxy", name] => start(name, false),
        ["test-attach", name] => attach(name),
        ["test-exec", name, ..] => exec(name, &words[2..]),
        _ => return None,
    };
    Some(match ended {
        Ok(Some(code)) => ExitCode::from(code),
        Ok(None) => ExitCode::from(42),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error}");
            ExitCode::from(match error.kind() {
                ErrorKind::CommandNotFound => 127,
                ErrorKind::CommandNotExecutable => 126,
                _ => 125,
            })
        }
    })
}

fn home() -> Home {
    Home::from_env(true).unwrap()
}

fn stdio() -> Stdio {
    Stdio {
        stdin: std::io::stdin().as_fd().try_clone_to_owned().unwrap(),
        stdout: std::io::stdout().as_fd().try_clone_to_owned().unwrap(),
        stderr: std::io::stderr().as_fd().try_clone_to_owned().unwrap(),
    }
}

fn supervise(id: &str, ready: &str) -> Result<Option<u8>, BackendError> {
    kiln_container::prepare()?;
    kiln_instance::supervise(&home(), &id.parse().unwrap(), ready.parse().unwrap(), kiln_container::KINDS)?;
    Ok(Some(0))
}

/// Makes a container of a specification in JSON, and waits to be killed.
fn create(spec: &str) -> Result<Option<u8>, BackendError> {
    kiln_container::prepare()?;
    Containers::open(&home())?.create(&serde_json::from_str(spec).unwrap())?;
    loop {
        std::thread::park();
    }
}

fn start(name: &str, signal_proxy: bool) -> Result<Option<u8>, BackendError> {
    kiln_container::prepare()?;
    let containers = Containers::open(&home())?;
    let id = containers.find(name)?.id;
    let mode = StartMode::Foreground { stdio: stdio(), detach_keys: "ctrl-p,ctrl-q".into(), signal_proxy };
    Ok(containers.start(&id, mode)?.map(|status| status.code))
}

fn attach(name: &str) -> Result<Option<u8>, BackendError> {
    let containers = Containers::open(&home())?;
    let id = containers.find(name)?.id;
    let options = AttachOptions {
        stdio: stdio(),
        stdin: true,
        detach_keys: "ctrl-p,ctrl-q".into(),
        signal_proxy: true,
    };
    Ok(match containers.attach(&id, options)? {
        AttachEnd::Exited(status) => Some(status.code),
        AttachEnd::Detached => None,
    })
}

fn exec(name: &str, args: &[&str]) -> Result<Option<u8>, BackendError> {
    let containers = Containers::open(&home())?;
    let id = containers.find(name)?.id;
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stdin());
    let spec = ExecSpec {
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        tty: terminal,
        stdin: true,
        detach_keys: "ctrl-p,ctrl-q".into(),
        ..ExecSpec::default()
    };
    Ok(containers.exec(&id, &spec, stdio())?.map(|status| status.code))
}
