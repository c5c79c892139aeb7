"""POST /languages: which languages texts are in."""

import asyncio

from fastapi import APIRouter

from crane_serve.common.text.languages import identify
from crane_serve.service.api.errors import ANY_ROUTE, responses
from crane_serve.service.api.schemas import LanguagesAnswer, LanguagesRequest

router = APIRouter()


@router.post("/languages", response_model=LanguagesAnswer, responses=responses(*ANY_ROUTE))
async def languages(body: LanguagesRequest) -> LanguagesAnswer:
    """The language of each text, by byte n-grams of its first 2000 characters (py3langid)."""
    return LanguagesAnswer(languages=await asyncio.to_thread(lambda: [identify(text) for text in body.text]))
