//! The benchmark's client, `PROGRAM sync|async load PATH BYTES OUTSTANDING MS`: threads or tasks that share one connection. Prints
//! calls, ns, and the median and 99th percentile of a call's ns.

use std::thread;
use std::time::{Duration, Instant};

use ttrpc::proto::Request;

use crate::{decoded, request, Outcome, BENCH};

fn echo(size: usize) -> Request {
    let mut made = request("Echo", &vec![0; size], 0, &[]);
    made.set_service(BENCH.into());
    made
}

fn checked(got: Result<Vec<u8>, ttrpc::Error>, size: usize) -> Outcome {
    match got {
        Ok(value) if value.len() == size => Ok(()),
        Ok(value) => Err(format!("an answer of {} bytes", value.len())),
        Err(error) => Err(error.to_string()),
    }
}

fn tell(began: Instant, mut taken: Vec<u128>) -> Outcome {
    let ns = began.elapsed().as_nanos();
    taken.sort_unstable();
    let (half, most) = (taken.len() / 2, taken.len() * 99 / 100);
    println!("{} {} {} {}", taken.len(), ns, taken.get(half).ok_or("no call")?, taken[most]);
    Ok(())
}

pub fn synchronous(path: &str, size: usize, outstanding: usize, ms: u64) -> Outcome {
    let client = ttrpc::sync::Client::connect(path).map_err(|error| error.to_string())?;
    let began = Instant::now();
    let until = began + Duration::from_millis(ms);
    let callers: Vec<_> = (0..outstanding)
        .map(|_| {
            let client = client.clone();
            thread::spawn(move || -> Result<Vec<u128>, String> {
                let mut taken = Vec::new();
                while Instant::now() < until {
                    let before = Instant::now();
                    checked(client.request(echo(size)).and_then(|answer| decoded(&answer.payload)), size)?;
                    taken.push(before.elapsed().as_nanos());
                }
                Ok(taken)
            })
        })
        .collect();
    let mut all = Vec::new();
    for caller in callers {
        all.extend(caller.join().map_err(|_| "a caller died".to_string())??);
    }
    tell(began, all)
}

async fn run(path: &str, size: usize, outstanding: usize, ms: u64) -> Outcome {
    let client = ttrpc::asynchronous::Client::connect(path).await.map_err(|error| error.to_string())?;
    let began = Instant::now();
    let until = began + Duration::from_millis(ms);
    let callers: Vec<_> = (0..outstanding)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move {
                let mut taken = Vec::new();
                while Instant::now() < until {
                    let before = Instant::now();
                    checked(client.request(echo(size)).await.and_then(|answer| decoded(&answer.payload)), size)?;
                    taken.push(before.elapsed().as_nanos());
                }
                Ok::<_, String>(taken)
            })
        })
        .collect();
    let mut all = Vec::new();
    for caller in callers {
        all.extend(caller.await.map_err(|error| error.to_string())??);
    }
    tell(began, all)
}

pub fn asynchronous(path: &str, size: usize, outstanding: usize, ms: u64) -> Outcome {
    tokio::runtime::Runtime::new()
        .map_err(|error| error.to_string())?
        .block_on(run(path, size, outstanding, ms))
}
