"""POST /languages: which languages texts are in."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from fastapi import APIRouter

from crane_serve.common.text.languages import identify
from crane_serve.service.api.errors import ANY_ROUTE, responses
from crane_serve.service.api.schemas import LanguagesAnswer, LanguagesRequest

router = APIRouter()

_identifying = ThreadPoolExecutor(1, "languages")  # more threads would only keep the event loop from running


@router.post("/languages", response_model=LanguagesAnswer, responses=responses(*ANY_ROUTE))
async def languages(body: LanguagesRequest) -> LanguagesAnswer:
    """The language of each text, by byte n-grams of its first 2000 characters (py3langid)."""
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(_identifying, lambda: [identify(text) for text in body.text])
    return LanguagesAnswer(languages=found)
