//! The flavour on tokio, with streams.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use protobuf::well_known_types::wrappers::BytesValue;
use ttrpc::proto::{Code, Request, Response};
use ttrpc::r#async::{
    Client, ClientStream, ClientStreamReceiver, ClientStreamSender, MethodHandler, Server, ServerStream, ServerStreamReceiver,
    ServerStreamSender, Service, StreamHandler, StreamInner, TtrpcContext,
};
use ttrpc::error::get_rpc_status;
use ttrpc::{get_status, Error};

use crate::*;

struct Method(&'static str);

fn response(result: Result<Vec<u8>, Error>) -> Response {
    match result {
        Ok(value) => {
            let mut response = Response::new();
            response.set_status(get_status(Code::OK, ""));
            response.set_payload(encoded(value));
            response
        }
        Err(error) => error.into(),
    }
}

#[async_trait]
impl MethodHandler for Method {
    async fn handler(&self, ctx: TtrpcContext, req: Request) -> ttrpc::Result<Response> {
        let value = match decoded(&req.payload) {
            Ok(value) => value,
            Err(error) => return Ok(error.into()),
        };
        if self.0 == "Sleep" {
            tokio::time::sleep(Duration::from_millis(pause(&value))).await;
        }
        Ok(response(answer(self.0, value, &ctx.metadata, ctx.timeout_nano)))
    }
}

struct Sum;

#[async_trait]
impl StreamHandler for Sum {
    async fn handler(&self, _: TtrpcContext, inner: StreamInner) -> ttrpc::Result<Option<Response>> {
        let mut requests = ServerStreamReceiver::<BytesValue>::new(inner);
        let (mut messages, mut bytes) = (0, 0);
        while let Some(message) = requests.recv().await? {
            messages += 1;
            bytes += message.value.len();
        }
        Ok(Some(response(Ok(format!("{messages} {bytes}").into()))))
    }
}

struct Count;

#[async_trait]
impl StreamHandler for Count {
    async fn handler(&self, _: TtrpcContext, mut inner: StreamInner) -> ttrpc::Result<Option<Response>> {
        let upto = pause(&decoded(&inner.recv().await?)?);
        let sender = ServerStreamSender::<BytesValue>::new(inner);
        for number in 0..upto {
            sender.send(&message(number.to_string())).await?;
        }
        Ok(None)
    }
}

struct Chat;

#[async_trait]
impl StreamHandler for Chat {
    async fn handler(&self, _: TtrpcContext, inner: StreamInner) -> ttrpc::Result<Option<Response>> {
        let mut stream = ServerStream::<BytesValue, BytesValue>::new(inner);
        while let Some(message) = stream.recv().await? {
            if message.value == b"fail" {
                return Ok(Some(get_rpc_status(Code::FAILED_PRECONDITION, "as asked").into()));
            }
            stream.send(&message).await?;
        }
        Ok(None)
    }
}

pub fn serve(path: &str, until_stdin_ends: impl FnOnce()) -> Outcome {
    let runtime = tokio::runtime::Runtime::new().map_err(|error| error.to_string())?;
    let unary = |names: &[&'static str]| -> HashMap<String, Box<dyn MethodHandler + Send + Sync>> {
        names.iter().map(|name| (name.to_string(), Box::new(Method(name)) as _)).collect()
    };
    let mut streams: HashMap<String, Arc<dyn StreamHandler + Send + Sync>> = HashMap::new();
    streams.insert("Sum".into(), Arc::new(Sum));
    streams.insert("Count".into(), Arc::new(Count));
    streams.insert("Chat".into(), Arc::new(Chat));
    let mut services = HashMap::new();
    services.insert(SERVICE.into(), Service { methods: unary(&UNARY), streams });
    services.insert(BENCH.into(), Service { methods: unary(&["Echo"]), streams: HashMap::new() });
    runtime.block_on(async {
        let mut server = Server::new().bind(path).map_err(|error| error.to_string())?.register_service(services);
        server.start().await.map_err(|error| error.to_string())?;
        tokio::task::block_in_place(until_stdin_ends);
        Ok(())
    })
}

async fn call_one(client: &Client, request: Request) -> Result<Vec<u8>, Error> {
    decoded(&client.request(request).await?.payload)
}

async fn run(path: &str, check: &str) -> Outcome {
    let client = Client::connect(path).await.map_err(|error| error.to_string())?;
    let ask = |method: &'static str, value: Vec<u8>| {
        let client = client.clone();
        async move { call_one(&client, request(method, &value, 0, &[])).await }
    };
    let plain = |error: Error| error.to_string();
    let opening = |method: &str| {
        let mut opening = request(method, b"", 0, &[]);
        opening.payload.clear();
        opening
    };
    match check {
        "unary" => expect(ask("Echo", b"hello".to_vec()).await.map_err(plain)?, b"hello".to_vec()),
        "empty" => expect(ask("Echo", vec![]).await.map_err(plain)?, vec![]),
        "megabyte" => expect(ask("Echo", megabyte()).await.map_err(plain)?, megabyte()),
        "codes" => {
            for code in 1..=16 {
                let got = ask("Fail", format!("{code} text é {code}").into_bytes()).await;
                expect_status(got, code, &format!("text é {code}"))?;
            }
            Ok(())
        }
        "unknown_method" => expect_status(ask("Nothing", vec![]).await, 12, "method Nothing"),
        "metadata" => {
            let pairs = [("one", "a"), ("Two", "b"), ("one", "c")];
            expect(call_one(&client, request("Metadata", b"one", 0, &pairs)).await.map_err(plain)?, b"a,c".to_vec())
        }
        "timeout" => {
            expect(ask("Timeout", vec![]).await.map_err(plain)?, b"none".to_vec())?;
            expect_remaining(call_one(&client, request("Timeout", b"", 60_000_000_000, &[])).await.map_err(plain)?)
        }
        "deadline" => {
            expect_late(call_one(&client, request("Sleep", b"500", 50_000_000, &[])).await)?;
            expect(ask("Echo", b"after".to_vec()).await.map_err(plain)?, b"after".to_vec())
        }
        "many" => {
            let callers: Vec<_> = (0..CALLERS)
                .map(|caller| {
                    let client = client.clone();
                    tokio::spawn(async move {
                        for call in 0..CALLS {
                            let value = format!("{caller} {call} ").repeat(caller * 10 + 1).into_bytes();
                            let got = call_one(&client, request("Echo", &value, 0, &[])).await.map_err(|error| error.to_string())?;
                            expect(got, value)?;
                        }
                        Ok::<(), String>(())
                    })
                })
                .collect();
            for caller in callers {
                caller.await.map_err(|error| error.to_string())??;
            }
            Ok(())
        }
        "client_streams" | "client_streams_nothing" => {
            let inner = client.new_stream(opening("Sum"), true, false).await.map_err(plain)?;
            let mut stream = ClientStreamSender::<BytesValue, BytesValue>::new(inner);
            let messages = if check == "client_streams" { 100 } else { 0 };
            for number in 0..messages {
                stream.send(&message(vec![0; number])).await.map_err(plain)?;
            }
            let want = if messages == 0 { "0 0" } else { "100 4950" };
            expect(stream.close_and_recv().await.map_err(plain)?.value, want.into())
        }
        "server_streams" => {
            let inner = client.new_stream(request("Count", b"100", 0, &[]), false, true).await.map_err(plain)?;
            let mut stream = ClientStreamReceiver::<BytesValue>::new(inner, client.clone());
            for number in 0..100 {
                expect(stream.recv().await.map_err(plain)?.map(|m| m.value), Some(number.to_string().into()))?;
            }
            expect(stream.recv().await.map_err(plain)?, None)
        }
        "both_stream" | "stream_fails" => {
            let inner = client.new_stream(opening("Chat"), true, true).await.map_err(plain)?;
            let mut stream = ClientStream::<BytesValue, BytesValue>::new(inner);
            for number in 0..100 {
                let sent = message(format!("message {number}"));
                stream.send(&sent).await.map_err(plain)?;
                expect(stream.recv().await.map_err(plain)?, sent)?;
            }
            if check == "stream_fails" {
                stream.send(&message("fail")).await.map_err(plain)?;
                return expect_status(stream.recv().await, 9, "as asked");
            }
            stream.close_send().await.map_err(plain)?;
            expect(stream.recv().await, Err(Error::Eof))
        }
        _ => Err(format!("no such check: {check}")),
    }
}

pub fn call(path: &str, check: &str) -> Outcome {
    tokio::runtime::Runtime::new().map_err(|error| error.to_string())?.block_on(run(path, check))
}
