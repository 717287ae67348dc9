from __future__ import annotations

from gateway.endpoints import ServedModel
from tests.gateway.engines import (
    CHAT,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    in_flight,
)

DEAD = "http://127.0.0.1:9"


def models(**large: object) -> tuple[ServedModel, ...]:
    return ServedModel(name="large", fallback=("gone", "small"), **large), ServedModel(name="small")


async def test_another_model_stands_in_where_the_operator_allows_it_and_a_header_tells() -> None:
    async with an_engine(name="small") as engine:
        small = an_endpoint(engine, model="small", id="s")
        dead = an_endpoint(DEAD, model="large", id="l")
        for endpoints in ((dead, small), (small,)):
            table = a_table(*endpoints, models=models())
            async with a_gateway(table) as gateway, a_client(gateway) as client:
                response = await client.post(CHAT, json=a_chat(model="large"))

                assert response.status == 200
                assert response.headers["x-bora-fallback"] == "small"
                assert (await response.json())["model"] == "large"
                assert engine.seen[-1].json["model"] == "small"
                assert in_flight(gateway, "small") == in_flight(gateway, "large") == 0


async def test_nothing_stands_in_for_a_model_unasked_or_for_a_clients_own_mistake() -> None:
    async with an_engine(status=400) as large, an_engine() as small:
        endpoints = an_endpoint(large, model="large"), an_endpoint(small, model="small")
        async with (
            a_gateway(a_table(*endpoints, models=models())) as gateway,
            a_client(gateway) as client,
        ):
            refused = await client.post(CHAT, json=a_chat(model="large"))
            fine = await client.post(CHAT, json=a_chat(model="small"))

            assert refused.status == 400
            assert "x-bora-fallback" not in fine.headers


async def test_when_nobody_can_stand_in_the_first_error_is_told() -> None:
    dead = an_endpoint(DEAD, model="large"), an_endpoint(DEAD, model="small", id="s")
    async with (
        a_gateway(a_table(*dead, models=models())) as gateway,
        a_client(gateway) as client,
    ):
        response = await client.post(CHAT, json=a_chat(model="large"))

        assert response.status == 503
        assert in_flight(gateway, "small") == in_flight(gateway, "large") == 0
