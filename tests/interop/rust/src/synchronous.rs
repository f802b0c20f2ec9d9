//! The blocking flavour, which has no streams.

use std::collections::HashMap;
use std::thread;
use std::time::Duration;

use ttrpc::proto::{Code, Request, Response};
use ttrpc::sync::{Client, MethodHandler, Server, TtrpcContext};
use ttrpc::{get_status, Error};

use crate::*;

struct Method(&'static str);

impl MethodHandler for Method {
    fn handler(&self, ctx: TtrpcContext, req: Request) -> ttrpc::Result<()> {
        let result = decoded(&req.payload).and_then(|value| {
            if self.0 == "Sleep" {
                thread::sleep(Duration::from_millis(pause(&value)));
            }
            answer(self.0, value, &ctx.metadata, ctx.timeout_nano)
        });
        let mut response = Response::new();
        match result {
            Ok(value) => {
                response.set_status(get_status(Code::OK, ""));
                response.set_payload(encoded(value));
            }
            Err(error) => response = error.into(),
        }
        ctx.respond(ctx.mh.stream_id, response)
    }
}

pub fn serve(path: &str, until_stdin_ends: impl FnOnce()) -> Outcome {
    let mut methods: HashMap<String, Box<dyn MethodHandler + Send + Sync>> = HashMap::new();
    methods.insert(format!("/{BENCH}/Echo"), Box::new(Method("Echo")));
    for name in UNARY {
        methods.insert(format!("/{SERVICE}/{name}"), Box::new(Method(name)));
    }
    let mut server = Server::new().bind(path).map_err(|error| error.to_string())?.register_service(methods);
    server.start().map_err(|error| error.to_string())?;
    until_stdin_ends();
    Ok(())
}

fn call_one(client: &Client, request: Request) -> Result<Vec<u8>, Error> {
    decoded(&client.request(request)?.payload)
}

pub fn call(path: &str, check: &str) -> Outcome {
    let client = Client::connect(path).map_err(|error| error.to_string())?;
    let ask = |method: &str, value: &[u8]| call_one(&client, request(method, value, 0, &[]));
    let plain = |error: Error| error.to_string();
    match check {
        "unary" => expect(ask("Echo", b"hello").map_err(plain)?, b"hello".to_vec()),
        "empty" => expect(ask("Echo", b"").map_err(plain)?, vec![]),
        "megabyte" => expect(ask("Echo", &megabyte()).map_err(plain)?, megabyte()),
        "codes" => (1..=16).try_for_each(|code| {
            expect_status(ask("Fail", format!("{code} text é {code}").as_bytes()), code, &format!("text é {code}"))
        }),
        "unknown_method" => expect_status(ask("Nothing", b""), 12, "method Nothing"),
        "metadata" => {
            let pairs = [("one", "a"), ("Two", "b"), ("one", "c")];
            expect(call_one(&client, request("Metadata", b"one", 0, &pairs)).map_err(plain)?, b"a,c".to_vec())
        }
        "timeout" => {
            expect(ask("Timeout", b"").map_err(plain)?, b"none".to_vec())?;
            expect_remaining(call_one(&client, request("Timeout", b"", 60_000_000_000, &[])).map_err(plain)?)
        }
        "deadline" => {
            expect_late(call_one(&client, request("Sleep", b"500", 50_000_000, &[])))?;
            expect(ask("Echo", b"after").map_err(plain)?, b"after".to_vec())
        }
        "many" => {
            let callers: Vec<_> = (0..CALLERS)
                .map(|caller| {
                    let client = client.clone();
                    thread::spawn(move || {
                        (0..CALLS).try_for_each(|call| {
                            let value = format!("{caller} {call} ").repeat(caller * 10 + 1).into_bytes();
                            let got = call_one(&client, request("Echo", &value, 0, &[])).map_err(|error| error.to_string())?;
                            expect(got, value)
                        })
                    })
                })
                .collect();
            callers.into_iter().try_for_each(|caller| caller.join().map_err(|_| "a caller died".to_string())?)
        }
        _ => Err(format!("no such check: {check}")),
    }
}
