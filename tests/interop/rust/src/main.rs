//! The peer of the interop checks on Rust's ttrpc: `PROGRAM sync|async serve PATH`, which ends when its stdin does, and
//! `PROGRAM sync|async call PATH CHECK`, which prints `ok` or what was wrong. Also the benchmark's client: load.rs.

mod asynchronous;
mod load;
mod synchronous;

use std::collections::HashMap;
use std::io::Read;

use protobuf::well_known_types::wrappers::BytesValue;
use protobuf::{Enum, Message};
use ttrpc::proto::{Code, Request};
use ttrpc::error::get_rpc_status;
use ttrpc::Error;

const SERVICE: &str = "interop.Peer";
/// The benchmark's service, which has Echo alone.
const BENCH: &str = "bench.Echo";
const UNARY: [&str; 5] = ["Echo", "Fail", "Metadata", "Timeout", "Sleep"];
const MEGABYTE: usize = 1 << 20;
const CALLERS: usize = 32;
const CALLS: usize = 50;

type Outcome = Result<(), String>;

fn message(value: impl Into<Vec<u8>>) -> BytesValue {
    BytesValue { value: value.into(), ..Default::default() }
}

fn decoded(payload: &[u8]) -> Result<Vec<u8>, Error> {
    BytesValue::parse_from_bytes(payload)
        .map(|message| message.value)
        .map_err(|error| get_rpc_status(Code::INTERNAL, error))
}

fn encoded(value: impl Into<Vec<u8>>) -> Vec<u8> {
    message(value).write_to_bytes().expect("a message of bytes can be encoded")
}

/// Milliseconds to sleep, for Sleep.
fn pause(value: &[u8]) -> u64 {
    String::from_utf8_lossy(value).parse().unwrap_or(0)
}

/// What each method without a stream answers.
fn answer(method: &str, value: Vec<u8>, metadata: &HashMap<String, Vec<String>>, timeout: i64) -> Result<Vec<u8>, Error> {
    let text = String::from_utf8_lossy(&value).into_owned();
    match method {
        "Fail" => {
            let (code, text) = text.split_once(' ').unwrap_or(("2", ""));
            let code = code.parse().ok().and_then(Code::from_i32).unwrap_or(Code::UNKNOWN);
            Err(get_rpc_status(code, text))
        }
        "Metadata" => Ok(metadata.get(&text).map(|values| values.join(",")).unwrap_or_default().into()),
        "Timeout" if timeout == 0 => Ok("none".into()),
        "Timeout" => Ok((timeout / 1_000_000).to_string().into()),
        _ => Ok(value),
    }
}

fn request(method: &str, value: &[u8], timeout: i64, metadata: &[(&str, &str)]) -> Request {
    let mut request = Request::new();
    request.set_service(SERVICE.into());
    request.set_method(method.into());
    request.set_payload(encoded(value));
    request.set_timeout_nano(timeout);
    let mut pairs = ttrpc::context::Context::default();
    for (key, value) in metadata {
        pairs.add(key.to_string(), value.to_string());
    }
    request.metadata = ttrpc::context::to_pb(pairs.metadata);
    request
}

fn expect<T: PartialEq + std::fmt::Debug>(got: T, want: T) -> Outcome {
    if got == want {
        Ok(())
    } else {
        Err(format!("got {:.200}, not {:.200}", format!("{got:?}"), format!("{want:?}")))
    }
}

fn expect_status<T: std::fmt::Debug>(got: Result<T, Error>, code: i32, text: &str) -> Outcome {
    match got {
        Err(Error::RpcStatus(status)) => expect((status.code().value(), status.message()), (code, text)),
        other => Err(format!("got {other:?}, not the status {code} {text}")),
    }
}

fn expect_late<T: std::fmt::Debug>(got: Result<T, Error>) -> Outcome {
    match got {
        Err(Error::RpcStatus(status)) => expect(status.code(), Code::DEADLINE_EXCEEDED),
        // The clients have no code for it.
        Err(Error::Others(text)) if text.contains("time") || text.contains("deadline") => Ok(()),
        other => Err(format!("got {other:?}, not a timeout")),
    }
}

fn expect_remaining(got: Vec<u8>) -> Outcome {
    let left = pause(&got);
    if (1..=60_000).contains(&left) {
        Ok(())
    } else {
        Err(format!("told {:?} ms of 60000", String::from_utf8_lossy(&got)))
    }
}

fn megabyte() -> Vec<u8> {
    (0..MEGABYTE).map(|at| (at * 31 + 7) as u8).collect()
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let path = words.get(3).map(|path| format!("unix://{path}")).unwrap_or_default();
    let until_stdin_ends = || {
        println!("ok");
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
    };
    let outcome = match words[1..] {
        ["sync", "serve", _] => synchronous::serve(&path, until_stdin_ends),
        ["async", "serve", _] => asynchronous::serve(&path, until_stdin_ends),
        ["sync", "call", _, check] => synchronous::call(&path, check),
        ["async", "call", _, check] => asynchronous::call(&path, check),
        [flavour @ ("sync" | "async"), "load", _, size, outstanding, ms] => {
            let number = |word: &str| word.parse::<usize>().map_err(|error| format!("{word}: {error}"));
            let load = if flavour == "sync" { load::synchronous } else { load::asynchronous };
            number(size).and_then(|size| load(&path, size, number(outstanding)?, number(ms)? as u64))
        }
        _ => Err("usage: sync|async serve PATH, call PATH CHECK, or load PATH BYTES OUTSTANDING MS".into()),
    };
    if let Err(text) = outcome {
        println!("{text}");
        std::process::exit(1);
    }
    if words.get(2) == Some(&"call") {
        println!("ok");
    }
}
